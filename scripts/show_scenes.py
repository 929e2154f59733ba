#!/usr/bin/env python3
"""Draw a few scenes of the embedded benchmark, with their questions and answers.

python3 scripts/dev.py shell -- python scripts/show_scenes.py --out docs/scenes.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import tokprune.eval.benchmarks as evals

SIDE, GAP, LINE = 288, 20, 21
INK, FAINT, PAPER = (30, 30, 30), (100, 100, 100), (255, 255, 255)


def sheet(split: str, number: int) -> Image.Image:
    """The first ``number`` scenes of a split side by side, their questions below."""
    benchmark = evals.load_benchmark("mini")
    scenes: dict[str, list[evals.Item]] = {}
    for item in benchmark.items(split):
        scenes.setdefault(item.image_id, []).append(item)
    shown = list(scenes.values())[:number]
    most = max(len(items) for items in shown)
    size = (number * SIDE + (number + 1) * GAP, SIDE + 3 * GAP + 2 * LINE * most)
    page = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(page)
    font = ImageFont.load_default(14)
    for n, items in enumerate(shown):
        x = GAP + n * (SIDE + GAP)
        picture = benchmark.image(items[0])
        page.paste(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (x, GAP))
        for i, item in enumerate(items):
            y = SIDE + 2 * GAP + 2 * LINE * i
            draw.text((x, y), item.question, INK, font)
            draw.text((x + 12, y + LINE - 3), f"{item.answers[0]}   ({item.task})", FAINT, font)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("scenes.png"))
    parser.add_argument("--split", default="validation")
    parser.add_argument("--number", type=int, default=4)
    options = parser.parse_args()
    sheet(options.split, options.number).save(options.out)


if __name__ == "__main__":
    main()
