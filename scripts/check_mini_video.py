#!/usr/bin/env python3
"""Accuracy of a video model's folder on the benchmark mini-video, by greedy decoding.

python3 scripts/dev.py shell -- python scripts/check_mini_video.py runs/mini-video/model
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from mini_training.video_labels import TOKENS
from mini_training.video_vision import normalised
from transformers import AutoTokenizer, LlavaNextVideoForConditionalGeneration

from evals.mini_video import MiniVideoBenchmark
from evals.mini_video.clip import CHANCE, TASKS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--split", default="validation")
    parser.add_argument("--limit", type=int, help="questions, all types in turn")
    parser.add_argument("--blind", action="store_true", help="grey frames instead")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, help="write one JSON line per question here")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    model = LlavaNextVideoForConditionalGeneration.from_pretrained(options.folder, dtype=dtype)
    model.eval()
    benchmark = MiniVideoBenchmark()
    rows, start = [], time.perf_counter()
    for item in benchmark.items(options.split, limit=options.limit):
        raw = np.stack([np.asarray(picture) for picture in benchmark.video(item)])
        if options.blind:
            raw = np.full_like(raw, 127)
        prompt = f"USER: {'<video>' * TOKENS * len(raw)}\n{item.question} ASSISTANT:"
        inputs = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            ids = model.generate(
                **inputs,
                pixel_values_videos=normalised(raw)[None].to(dtype),
                max_new_tokens=benchmark.max_new_tokens,
                do_sample=False,
            )
        told = tokenizer.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        rows.append({"id": item.id, "task": item.task, "answer": item.answers[0], "told": told})
        if options.out:
            with open(options.out, "a") as out:
                out.write(json.dumps(rows[-1]) + "\n")
    for task in TASKS:
        own = [row for row in rows if row["task"] == task]
        right = sum(row["told"] == row["answer"] for row in own)
        low, high = wilson(right, len(own))
        print(f"{task}: {right}/{len(own)} = {100 * right / len(own):.1f} % "
              f"({100 * low:.1f}-{100 * high:.1f}), chance {100 * CHANCE[task]:.0f} %")  # fmt: skip
    print(f"{time.perf_counter() - start:.0f} s")
    return 0


def wilson(right: int, number: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share."""
    share = right / number
    middle = share + z * z / (2 * number)
    reach = z * math.sqrt(share * (1 - share) / number + z * z / (4 * number * number))
    scale = 1 + z * z / number
    return (middle - reach) / scale, (middle + reach) / scale


if __name__ == "__main__":
    sys.exit(main())
