#!/usr/bin/env python3
"""How prefill and selection grow with the number of visual tokens and with the batch.

    python scripts/bench_growth.py [--shape small] [--json FILE] [--plot docs/growth.svg]

A Qwen2.5-VL with random weights, which takes images of any size: of 7 billion weights on CUDA, on a
CPU a small one whose encoder sees windows only. Every round measures every point once, the unpruned
model and all methods, in alternating order, so all points have as many rounds; after --seconds no
new round starts. Of each method there is the exponent b of time = a · sizeᵇ, fitted in every round,
with the 95 % interval of its median, and the exponents between neighbouring sizes, since prefill
has a linear and a quadratic part. ``--plot`` draws what was measured (needs matplotlib).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tokprune.bench.clock import CLOCKS, milliseconds, set_aside, turns
from tokprune.bench.environment import environment
from tokprune.bench.growth import growth
from tokprune.bench.measure import Variant, measure
from tokprune.bench.models import random_model, shape_of
from tokprune.bench.prompts import default_image, encode, prompt
from tokprune.bench.released import RELEASED, Released

#: sides of a visual token in pixels
CELL = 28
PARTS = ("prefill", "selection")
NONE = "unpruned"

_ROTARY = {"mrope_section": [4, 6, 6]}
_TOKENS = {
    "image_token_id": 250, "video_token_id": 251, "vision_start_token_id": 252,
    "vision_end_token_id": 253,
}  # fmt: skip
SMALL = RELEASED["qwen2.5-vl-7b"].changed(
    {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 256,
    },
    {
        "depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2,
        "out_hidden_size": 64, "fullatt_block_indexes": [2],  # beyond the depth: none
    },
    rotary=_ROTARY, rest=_TOKENS,
)  # fmt: skip


def sides(tokens: int) -> tuple[int, int]:
    """(rows, columns) of so many cells, as near to a square as their number allows."""
    rows = next(n for n in range(math.isqrt(tokens), 0, -1) if tokens % n == 0)
    return rows, tokens // rows


def inputs_of(model: Any, tokens: int, batch: int, text: int) -> dict[str, Any]:
    """A batch of equal prompts with an image of ``tokens`` visual tokens."""
    rows, columns = sides(tokens)
    encoded = encode(model, default_image((rows * CELL, columns * CELL)))
    assert encoded.tokens == tokens
    return prompt(model, encoded, text, batch)


def run(
    model: Any, methods: list[str], keep: float, sizes: list[int], batches: list[int], *,
    rounds: int, seconds: float, text: int = 32, clock: str = "wall",
) -> dict[str, Any]:  # fmt: skip
    """Growth by visual tokens (at the first batch size) and by batch (at the first number of
    tokens): ``{"by_tokens": {variant: {part: growth}}, "by_batch": …, "rounds": …}``, the growth as
    in :mod:`tokprune.bench.growth`."""
    from tokprune.bench.run import trials_of
    from tokprune.families import family_of

    family = family_of(model)
    facts = family.facts(model, family.parts(model))
    variants = {NONE: Variant.of(model, None)}
    for trial in trials_of(methods, [keep], facts.decoder_layers):
        variants[trial.method.name] = Variant.of(model, trial.method)
    points = [(n, batches[0]) for n in sizes] + [(sizes[0], b) for b in batches[1:]]
    given = {point: inputs_of(model, *point, text) for point in points}
    times: dict[Any, dict[str, dict[str, list[float]]]] = {}
    start = time.perf_counter()
    for number in range(rounds):
        if number and time.perf_counter() - start > seconds:
            break
        for name in turns([str(i) for i in range(len(points))], number):
            point = points[int(name)]
            found = measure(
                model, given[point], variants, 1, 1, parts=PARTS, warmup=int(number == 0),
                clock=clock,
            )  # fmt: skip
            for variant, parts in found.items():
                for part, values in parts.items():
                    own = times.setdefault(point, {}).setdefault(variant, {})
                    own.setdefault(part, []).extend(values)
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)

    def grown(by: dict[int, Any]) -> dict[str, Any]:
        if len(by) < 2:
            return {}
        return {
            variant: {
                part: growth({size: times[point][variant][part] for size, point in by.items()})
                for part in times[points[0]][variant]
            }
            for variant in variants
        }

    return {
        "by_tokens": grown({n: (n, batches[0]) for n in sizes}),
        "by_batch": grown({b: (sizes[0], b) for b in batches}),
        "rounds": len(times[points[0]][NONE]["prefill"]),
    }


def lines(found: dict[str, Any]) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """(by what, variant, part, its growth)."""
    for by in ("by_tokens", "by_batch"):
        for variant, parts in found[by].items():
            for part, own in parts.items():
                yield by, variant, part, own


def tables(found: dict[str, Any]) -> Iterator[Any]:
    from rich import box
    from rich.table import Table

    for by in ("by_tokens", "by_batch"):
        if not found[by]:
            continue
        sizes = found[by][NONE]["prefill"]["sizes"]
        word = {"by_tokens": "visual tokens", "by_batch": "batch"}[by]
        table = Table(title=f"Milliseconds by {word}", box=box.SIMPLE_HEAD, title_justify="left")
        for name in ("", "", *map(str, sizes), "exponent (95 %)", "last step"):
            table.add_column(name, justify="right" if name else "left")
        for own_by, variant, part, own in lines(found):
            if own_by == by:
                table.add_row(
                    variant, part, *(milliseconds(s) for s in own["seconds"]), _exponent(own),
                    f"{own['between'][-1]:.2f}",
                )  # fmt: skip
        yield table


def _exponent(own: dict[str, Any]) -> str:
    told = own["exponent"]
    span = "" if told["low"] is None else f" ({told['low']:.2f}–{told['high']:.2f})"
    return f"{told['median']:.2f}{span}"


def plot(data: dict[str, Any], path: Path) -> None:
    """Prefill and selection against visual tokens and against the batch, both axes logarithmic."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "tokprune"  # the same picture from the same figures
    matplotlib.rcParams["svg.fonttype"] = "none"  # text is text
    shown = [by for by in ("by_tokens", "by_batch") if data[by]]
    figure, axes = plt.subplots(1, len(shown), figsize=(5.5 * len(shown), 4), squeeze=False)
    for by, axis in zip(shown, axes[0]):
        colours: dict[str, str] = {}
        for own_by, variant, part, own in lines(data):
            if own_by != by:
                continue
            colour = colours.setdefault(variant, f"C{len(colours)}")
            style = "o-" if part == "prefill" else "s:"
            label = f"{variant}, {part}: {own['exponent']['median']:.2f}"
            values = [1000 * s for s in own["seconds"]]
            axis.loglog(own["sizes"], values, style, color=colour, label=label)
        sizes = data[by][NONE]["prefill"]["sizes"]
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize=8)
        axis.minorticks_off()
        axis.set_xlabel({"by_tokens": "visual tokens", "by_batch": "batch"}[by])
        axis.set_ylabel("milliseconds")
        axis.grid(True, which="both", alpha=0.3)
        axis.legend(fontsize=7, title="exponent", title_fontsize=7)
    env, settings = data["environment"], data["settings"]
    place = env["device"] if env["device"] != "cpu" else env["cpu"]
    figure.suptitle(f"{place}, {settings['shape']}, keep {settings['keep']:.3g}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _numbers(text: str) -> list[int]:
    parts = text.split(",")
    if not all(p.strip().isdecimal() and int(p) > 0 for p in parts):
        raise argparse.ArgumentTypeError(f"{text!r} should be whole numbers above 0, with commas")
    numbers = [int(part) for part in parts]
    if len(set(numbers)) < len(numbers):
        raise argparse.ArgumentTypeError(f"{text!r} names a number twice")
    return numbers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=("small", "qwen2.5-vl-7b"), help="default: small on CPU")
    parser.add_argument("--methods", default="divprune,fastv", help="separated by commas")
    parser.add_argument("--keep", type=float, default=1 / 9, help="share of the visual tokens")
    parser.add_argument("--sizes", type=_numbers, default=[576, 1296, 2880, 4096, 8192, 16384])
    parser.add_argument("--batches", type=_numbers, default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=300, help="no new round after that")
    parser.add_argument(
        "--clock", default="wall", choices=tuple(CLOCKS), help="cpu: shared machine"
    )
    parser.add_argument("--json", type=Path, help="write everything to this file")
    parser.add_argument("--plot", type=Path, help="draw it, as SVG")
    given = parser.parse_args()
    if len(given.sizes) < 2 and len(given.batches) < 2:
        parser.error("--sizes and --batches are one point; one of them should be several numbers")
    if given.rounds < 1:
        parser.error(f"--rounds {given.rounds} should be at least 1")
    if not 0 < given.keep < 1:
        parser.error(f"--keep {given.keep:g} should be between 0 and 1")
    for option, path in (("--json", given.json), ("--plot", given.plot)):
        if path is not None and not path.absolute().parent.is_dir():
            parser.error(f"{option} {path}: no such folder")
    import transformers

    transformers.logging.set_verbosity_error()
    cuda = torch.cuda.is_available()
    if cuda and given.clock == "cpu":
        parser.error("--clock cpu sees no work of a GPU; use wall")
    name = given.shape or ("qwen2.5-vl-7b" if cuda else "small")
    shape = SMALL if name == "small" else shape_of(name)
    assert isinstance(shape, Released)
    try:
        model = random_model(
            shape, dtype=torch.bfloat16 if cuda else torch.float32, device="cuda" if cuda else "cpu"
        )
        methods = [part.strip() for part in given.methods.split(",")]
        with set_aside():
            found = run(
                model, methods, given.keep, given.sizes, given.batches, rounds=given.rounds,
                seconds=given.seconds, clock=given.clock,
            )  # fmt: skip
    except (MemoryError, TypeError, ValueError) as error:
        parser.error(str(error))
    data = {
        "schema": 1, "environment": environment(model.device),
        "settings": {"shape": name, "keep": given.keep, "clock": given.clock},
        **found,
    }  # fmt: skip
    from rich.console import Console

    console = Console(width=max(Console().width, 120))
    for table in tables(found):
        console.print(table)
    if given.json is not None:
        given.json.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    if given.plot is not None:
        plot(data, given.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
