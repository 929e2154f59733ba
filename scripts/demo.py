#!/usr/bin/env python3
"""The main job on the embedded model: sweep methods, report, choose a setting, use it.

    python3 scripts/dev.py demo [--out DIR] [--limit 256] [--keep 1/2,1/4,1/9,1/36] [--methods all]

Runs the commands that a user would (they are printed), on the model and the benchmark that ship
with the package; nothing is downloaded:

1. ``tokprune sweep``: nine methods and the controls at every budget, resumable;
2. ``tokprune report``: tables, plots, overlays in one HTML page;
3. ``tokprune recommend``: the cheapest setting that loses at most 5 points of macro accuracy;
4. ``tokprune run``: one question, unpruned and with that setting.

Writes DIR/sweep (the run folder), DIR/sweep/report/report.html, DIR/setting.json, DIR/scene.png,
DIR/kept.png, and DIR/overlays.png: what every method leaves of one image.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

import tokprune
import tokprune.eval.benchmarks as evals
from tokprune.families import family_of
from tokprune.inputs.prompts import encode
from tokprune.methods import Method, image_methods, make_method

#: those of the table in README.md; ``--methods all`` takes every one, and longer
METHODS = "todre,transprune,flowcut,pitome,tome,mustdrop,visionzip,divprune,fastv"
#: questions from which the settings are chosen by one half and reported on the other
HALVED = 200
PANEL = 288  # a multiple of the 24 patches
INK, FAINT, PAPER = (30, 30, 30), (110, 110, 110), (255, 255, 255)


def command(*arguments: str) -> None:
    """Print and run a ``tokprune`` command; stop with its exit code where it fails."""
    print(f"\n$ {shlex.join(['tokprune', *arguments])}", flush=True)
    code = subprocess.run([sys.executable, "-m", "tokprune", *arguments]).returncode
    if code:
        sys.exit(code)


# ---------------------------------------------------------------------------- images


def what_is_left(image: Image.Image, question: str, keep: int) -> Image.Image:
    """One image: the scene, and what every method leaves of it at ``keep`` tokens."""
    model, processor = tokprune.load("mini", processor=True, dtype="float32")
    inputs = encode(processor, [question], [image], model.device)
    seen = image.resize((PANEL, PANEL), Image.Resampling.LANCZOS)
    cells = [(seen, "the image", f"{question} {answer(model, processor, inputs)}")]
    for name in image_methods():
        method = reachable(model, name, keep)
        with tokprune.compress(model, method) as trace:
            given = answer(model, processor, inputs)
            told = trace.to_dict()
            strip = tokprune.overlay(trace, image, processor=processor, size=PANEL)
        last, mean = told["visual_tokens_out"][0], told["mean_visual_tokens"]
        tokens = f"{last} tokens" if mean == last else f"{last} tokens, mean {mean:.0f}"
        cells.append((last_panel(strip), name, f"{tokens}: {given}"))
    return contact_sheet(cells, f"What is left of 576 visual tokens (keep = {keep})")


def reachable(model: Any, name: str, keep: int) -> Method:
    """The method at ``keep`` tokens, or at the least it can do on a tower of this depth."""
    family = family_of(model)
    facts = family.facts(model, family.parts(model))
    for least in range(keep, facts.max_visual_tokens + 1):
        options = image_methods()[name].options_for_depth(facts.decoder_layers)
        method = make_method(name, keep=least, **options)
        try:
            method.plan(facts)
        except ValueError:
            continue
        return method
    raise ValueError(f"{name} leaves all {facts.max_visual_tokens} tokens of this model")


def answer(model: Any, processor: Any, inputs: Any) -> str:
    import torch

    with torch.inference_mode():
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    new = tokens[0, inputs["input_ids"].shape[1] :]
    return str(processor.decode(new, skip_special_tokens=True)).strip()


def last_panel(strip: Image.Image) -> Image.Image:
    """The rightmost square of an overlay: what is left in the last decoder layer."""
    margin = PANEL // 24
    right = strip.width - margin
    return strip.crop((right - PANEL, margin, right, margin + PANEL))


def contact_sheet(
    cells: Sequence[tuple[Image.Image, str, str]], title: str, columns: int = 5
) -> Image.Image:
    columns = min(columns, len(cells))
    gap, caption, head, foot = 22, 48, 46, 62
    width = columns * PANEL + (columns + 1) * gap
    lines = -(-len(cells) // columns)
    sheet = Image.new("RGB", (width, head + lines * (PANEL + caption + gap) + foot), PAPER)
    draw = ImageDraw.Draw(sheet)
    large, medium, small = (ImageFont.load_default(size) for size in (24, 19, 15))
    draw.text((gap, 14), title, INK, large)
    for number, (image, name, text) in enumerate(cells):
        x = gap + number % columns * (PANEL + gap)
        y = head + 10 + number // columns * (PANEL + caption + gap)
        sheet.paste(image, (x, y))
        draw.text((x, y + PANEL + 4), name, INK, medium)
        draw.text((x, y + PANEL + 27), text, FAINT, small)
    note = (
        "Clear patches with a frame stay; grey ones are dropped. Patches of one colour are merged "
        "into one token. Mean: over the decoder's layers, for methods that prune inside it. After "
        "the colon: the model's answer."
    )
    wrapped = textwrap.wrap(note, width=round(width / 7.4))
    draw.multiline_text((gap, sheet.height - foot + 6), "\n".join(wrapped), FAINT, small, spacing=5)
    return sheet


# -------------------------------------------------------------------------------- main


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder (runs/demo)")
    parser.add_argument("--limit", type=int, default=256, help="questions (256)")
    parser.add_argument("--keep", default="1/2,1/4,1/9,1/36", help="budgets")
    parser.add_argument("--methods", default=METHODS, help="names, separated by commas, or all")
    options = parser.parse_args()
    start = time.perf_counter()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    run = str(out / "sweep")

    methods = [] if options.methods == "all" else ["--methods", options.methods]
    command("sweep", "--model", "mini", "--split", "quick", "--limit", str(options.limit),
            "--keep", options.keep, *methods, "--out", run)  # fmt: skip
    command("report", run)
    setting = str(out / "setting.json")
    # a few images cannot be halved, to choose by some and report on others
    same = [] if options.limit >= HALVED else ["--same-questions"]
    command("recommend", run, "--max-drop", "5%", *same, "--out", setting)

    benchmark = evals.load_benchmark("mini")
    item = next(i for i in benchmark.items("quick") if i.task == "plate")
    image = benchmark.image(item)
    image.save(out / "scene.png")
    command("run", "--model", "mini", "--setting", setting, "--image", str(out / "scene.png"),
            "--prompt", item.question, "--compare", "--overlay", str(out / "kept.png"))  # fmt: skip
    what_is_left(image, item.question, 64).save(out / "overlays.png")

    minutes = (time.perf_counter() - start) / 60
    print(f"\nreport:   {Path(run, 'report', 'report.html')}")
    print(f"overlays: {out / 'overlays.png'}\nsetting:  {setting}\n{minutes:.1f} minutes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
