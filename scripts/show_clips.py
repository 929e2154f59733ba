#!/usr/bin/env python3
"""Draw clips of the embedded video task as a contact sheet, one of each type.

python3 scripts/dev.py shell -- python scripts/show_clips.py --first 3 --out docs/clips.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import tokprune.eval.benchmarks as evals

SIDE, GAP, LINE = 144, 6, 22
INK, FAINT, PAPER = (30, 30, 30), (100, 100, 100), (255, 255, 255)
#: colours of the sheet; so many keep the objects' colours apart and the file small
COLORS = 192


def sheet(split: str, first: int = 0) -> Image.Image:
    """One clip of each type, a row of frames under its question; ``first``: which of the split."""
    benchmark = evals.load_benchmark("mini-video")
    number = len(benchmark.tasks)
    items = benchmark.items(split, limit=(first + 1) * number)[first * number :]
    clips = [benchmark.video(item) for item in items]
    frames = max(len(clip) for clip in clips)
    row = LINE + SIDE + GAP
    page = Image.new("RGB", (GAP + frames * (SIDE + GAP), GAP + row * len(items)), PAPER)
    draw = ImageDraw.Draw(page)
    font = ImageFont.load_default(14)
    for n, (item, clip) in enumerate(zip(items, clips, strict=True)):
        y = GAP + n * row
        draw.text((GAP, y), item.question, INK, font)
        told = f"{item.answers[0]}   ({item.task})"
        draw.text((GAP + 18 + draw.textlength(item.question, font), y), told, FAINT, font)
        for i, frame in enumerate(clip):
            small = frame.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            page.paste(small, (GAP + i * (SIDE + GAP), y + LINE))
    return page.quantize(COLORS, dither=Image.Dither.NONE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("clips.png"))
    parser.add_argument("--split", default="validation")
    parser.add_argument("--first", type=int, default=0, help="which clip of each type, from 0")
    options = parser.parse_args()
    sheet(options.split, options.first).save(options.out, optimize=True)


if __name__ == "__main__":
    main()
