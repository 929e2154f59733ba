#!/usr/bin/env python3
"""Compress a small LLaVA with every method: a table, a report and overlay pictures.

    python3 scripts/dev.py demo [--out DIR] [--methods todre,fastv] [--keep 64]

Builds a LLaVA-1.5 of about 2 million random parameters and a picture, both in code (no downloads),
writes them to DIR, loads the model back as a user would, and runs every method at one budget:
``keep`` visual tokens after its last pruning. Per method it reports

- visual tokens after the last pruning, and their mean over the decoder's layers;
- FLOPs of the prefill against the unpruned model, from the trace (scoring not counted);
- bytes of the KV cache after the prefill;
- time of the prefill (median of several, in turns with the unpruned model).

The weights are random, so an answer means nothing and no accuracy is shown; and the model is so
small that much of its time is Python: ``scripts/bench_operators.py methods`` measures a larger one.

Writes DIR/report.md, DIR/overlays.png (what each method leaves, one picture), DIR/stages/*.png (all
stages of each method), DIR/photo.png, DIR/model, and DIR/kept.png by the command line tool.
"""

from __future__ import annotations

import argparse
import math
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import demo_model
import torch
import transformers
from _measure import Spread, milliseconds, once
from PIL import Image, ImageDraw, ImageFont

import tokprune
from tokprune.methods import Method, available_methods, make_method

NEW_TOKENS = 6
PANEL = 288  # a multiple of the 24 patches
INK, FAINT, PAPER = (30, 30, 30), (110, 110, 110), (255, 255, 255)


@dataclass
class Row:
    """What one method did. ``method`` None: the unpruned model."""

    name: str
    method: Method | None
    last: int
    mean: float
    flops: float
    kv_bytes: int
    answer: str
    picture: Image.Image | None = None
    times: list[float] | None = None

    @property
    def seconds(self) -> Spread:
        return Spread.of(self.times or [math.nan])


def run_method(
    model: Any, processor: Any, inputs: Any, photo: Image.Image, method: Method, stages: Path
) -> Row:
    """Generate with a method, and read its trace; saves the picture of all its stages."""
    with tokprune.compress(model, method) as trace:
        answer = generate(model, processor, inputs)
        told = trace.to_dict()
        strip = tokprune.overlay(trace, photo, processor=processor, size=PANEL)
    strip.save(stages / f"{method.name}.png")
    return Row(
        name=method.name,
        method=method,
        last=told["visual_tokens_out"][0],
        mean=told["mean_visual_tokens"],
        flops=told["macs"]["total"] / told["macs_unpruned"]["total"],
        kv_bytes=told["kv_bytes"],
        answer=answer,
        picture=last_panel(strip),
    )


def run_unpruned(model: Any, processor: Any, inputs: Any, told: dict[str, Any]) -> Row:
    """The model without any method; what it holds is known from another trace."""
    tokens = told["visual_tokens_in"][0]
    return Row(
        name="unpruned",
        method=None,
        last=tokens,
        mean=tokens,
        flops=1.0,
        kv_bytes=told["kv_bytes_unpruned"],
        answer=generate(model, processor, inputs),
    )


def generate(model: Any, processor: Any, inputs: Any) -> str:
    with torch.inference_mode():
        tokens = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    new = tokens[0, inputs["input_ids"].shape[1] :]
    return str(processor.decode(new, skip_special_tokens=True)).strip()


def time_prefills(model: Any, inputs: Any, rows: Sequence[Row], rounds: int) -> None:
    """Prefill of every row once a round; the first round warms up and is thrown away."""

    def prefill() -> Any:
        with torch.inference_mode():
            return model(**inputs, use_cache=True, logits_to_keep=1)

    for number in range(rounds + 1):
        for row in rows if number % 2 else reversed(rows):
            if row.method is None:
                seconds = once(prefill)
            else:
                with tokprune.compress(model, row.method):
                    seconds = once(prefill)
            if number:
                row.times = [*(row.times or []), seconds]


# ---------------------------------------------------------------------------- pictures


def last_panel(strip: Image.Image) -> Image.Image:
    """The rightmost square of an overlay: what is left in the last decoder layer."""
    margin = PANEL // 24
    right = strip.width - margin
    return strip.crop((right - PANEL, margin, right, margin + PANEL))


def contact_sheet(
    photo: Image.Image, rows: Sequence[Row], keep: int, columns: int = 5
) -> Image.Image:
    """One picture: the photo as the model sees it, and what every method leaves of it."""
    side = min(photo.size)
    left, top = (photo.width - side) // 2, (photo.height - side) // 2
    seen = photo.crop((left, top, left + side, top + side))
    seen = seen.resize((PANEL, PANEL), Image.Resampling.LANCZOS)
    cells = [(seen, "the picture", "576 patches")]
    for row in rows:
        if row.picture is not None:
            mean = "in every layer" if row.mean == row.last else f"mean {row.mean:.0f} per layer"
            cells.append((row.picture, row.name, f"{row.last} tokens, {mean}"))
    columns = min(columns, len(cells))
    gap, caption, head, foot = 22, 48, 46, 62
    width = columns * PANEL + (columns + 1) * gap
    lines = -(-len(cells) // columns)
    sheet = Image.new("RGB", (width, head + lines * (PANEL + caption + gap) + foot), PAPER)
    draw = ImageDraw.Draw(sheet)
    large, medium, small = (ImageFont.load_default(size) for size in (24, 19, 15))
    title = f"What is left of 576 visual tokens (keep = {keep})"
    draw.text((gap, 14), title, INK, large)
    for number, (picture, name, text) in enumerate(cells):
        x = gap + number % columns * (PANEL + gap)
        y = head + 10 + number // columns * (PANEL + caption + gap)
        sheet.paste(picture, (x, y))
        draw.text((x, y + PANEL + 4), name, INK, medium)
        draw.text((x, y + PANEL + 27), text, FAINT, small)
    note = (
        "Clear patches with a frame stay; grey ones are dropped. Patches of one colour are merged "
        "into one token. Random weights: the picture shows the mechanism, not the quality of a "
        "choice."
    )
    wrapped = textwrap.wrap(note, width=round(width / 7.4))
    draw.multiline_text((gap, sheet.height - foot + 6), "\n".join(wrapped), FAINT, small, spacing=5)
    return sheet


# ------------------------------------------------------------------------------ report

HEADS = ("method", "last", "mean", "FLOPs", "KV cache", "prefill ms", "speed-up")


def cells(row: Row, unpruned: Row) -> tuple[str, ...]:
    """A row as text, for the terminal and for the report."""
    time = row.seconds
    half = 500 * time.iqr
    return (
        row.name,
        str(row.last),
        f"{row.mean:.0f}" if row.mean == round(row.mean) else f"{row.mean:.1f}",
        f"{100 * row.flops:.0f} %",
        f"{row.kv_bytes / 1024:.0f} KiB",
        f"{milliseconds(time.median)} ± {half:.{0 if half >= 10 else 1}f}",
        f"{unpruned.seconds.median / time.median:.2f}×",
    )


def print_table(rows: Sequence[Row], caption: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left")
    for name in HEADS:
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*cells(row, rows[0]), style="dim" if row.method is None else None)
    Console().print(table)


def report(rows: Sequence[Row], facts: str, command: str, transcript: str) -> str:
    lines = [
        "# tokprune demo",
        "",
        facts,
        "",
        "**The weights are random: answers are noise, and no accuracy is shown.** Tokens, FLOPs",
        "and cache are exact; times are of this small model on this machine, where much of a",
        "forward is Python (see `scripts/bench_operators.py methods` for a larger model).",
        "",
        "| " + " | ".join(HEADS) + " |",
        "|---|" + "---:|" * (len(HEADS) - 1),
        *("| " + " | ".join(cells(row, rows[0])) + " |" for row in rows),
        "",
        "*last*: visual tokens after the last pruning; *mean*: over all decoder layers; *FLOPs*:",
        "of the prefill, encoder and head included, scoring not counted; *KV cache*: after the",
        "prefill, text included; *prefill*: median ± half the interquartile range.",
        "",
        "![What each method leaves](overlays.png)",
        "",
        "Every stage of every method: `stages/`. The methods as configured, and the model's words:",
        "",
        *(f"- `{row.method!r}` → {row.answer}" for row in rows if row.method is not None),
        "",
        "## The same from the command line",
        "",
        "```",
        f"$ {command}",
        transcript.strip(),
        "```",
        "",
    ]
    return "\n".join(lines)


def command_line(out: Path, keep: int) -> tuple[str, str]:
    """A ``tokprune run`` command that a user can paste, and what it prints."""
    arguments = [
        "run", "--model", str(out / "model"), "--method", "todre", "--keep", str(keep),
        "--image", str(out / "photo.png"), "--prompt", demo_model.QUESTION,
        "--max-new-tokens", str(NEW_TOKENS), "--overlay", str(out / "kept.png"),
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "tokprune", *arguments], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"tokprune run failed:\n{done.stdout}{done.stderr}")
    return shlex.join(["tokprune", *arguments]), done.stdout


# -------------------------------------------------------------------------------- main


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder (runs/demo)")
    parser.add_argument("--methods", help="names, separated by commas (default: all)")
    parser.add_argument("--keep", type=int, default=64, help="visual tokens left (default: 64)")
    parser.add_argument("--rounds", type=int, default=5, help="timed prefills per method")
    options = parser.parse_args()
    names = list(available_methods())
    if options.methods is not None:
        wanted = [n.strip() for n in options.methods.split(",")]
        if unknown := [n for n in wanted if n not in names]:
            parser.error(f"--methods {unknown[0]!r} is unknown; there are: {', '.join(names)}")
        names = [n for n in names if n in wanted]

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    out: Path = options.out
    stages = out / "stages"
    stages.mkdir(parents=True, exist_ok=True)
    photo = demo_model.picture()
    photo.save(out / "photo.png")
    demo_model.save(out / "model")
    model, processor = tokprune.load(out / "model", processor=True)
    facts = model_facts(model)
    print(facts)
    content = [{"type": "image"}, {"type": "text", "text": demo_model.QUESTION}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(images=[photo], text=text, return_tensors="pt")

    layers = model.config.text_config.num_hidden_layers
    rows: list[Row] = []
    for name in names:
        method = make_method(name, **demo_model.comparable(name, layers, options.keep))
        rows.append(run_method(model, processor, inputs, photo, method, stages))
    with tokprune.compress(model, "random", keep=1.0) as trace:
        generate(model, processor, inputs)
        told = trace.to_dict()
    rows.insert(0, run_unpruned(model, processor, inputs, told))
    time_prefills(model, inputs, rows, options.rounds)

    contact_sheet(photo, rows, options.keep).save(out / "overlays.png")
    command, transcript = command_line(out, options.keep)
    (out / "report.md").write_text(report(rows, facts, command, transcript))
    print_table(
        rows,
        "last, mean: visual tokens after the last pruning, and over all decoder layers. Random "
        "weights: no accuracy is shown.",
    )
    print(f"$ {command}\n{transcript.rstrip()}\n")
    print(f"report: {out / 'report.md'}\npictures: {out / 'overlays.png'}, {stages}/")
    return 0


def model_facts(model: Any) -> str:
    config = model.config
    vision, text = config.vision_config, config.text_config
    number = sum(p.numel() for p in model.parameters()) / 1e6
    return (
        f"LLaVA-1.5 with random weights, built in code: CLIP tower {vision.num_hidden_layers}×"
        f"{vision.hidden_size} with 24×24 patches, Llama {text.num_hidden_layers}×"
        f"{text.hidden_size}, {number:.1f} M parameters, float32, "
        f"{torch.get_num_threads()} threads."
    )


if __name__ == "__main__":
    sys.exit(main())
