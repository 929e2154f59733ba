#!/usr/bin/env python3
"""What selections of video tokens keep of what changes: clips of the embedded video task, no model
that answers.

    python scripts/video_tokens.py [--features pixels] [--clips 20] [--keep 1/2,1/4] [--json FILE]

Every clip is 8 frames of 24 × 24 patches of 8 × 8 pixels. Features are the patches' own pixels
(192 values in [-1, 1]), or what the embedded picture model sees in each frame (``--features mini``:
vision tower and projector). Which patches changed is known from the scene: their pixels differ from
the frame before, before camera noise is added. *Evidence* is those changed patches that the answer
depends on: what moved in its new place, what appeared, the flashing text when it comes up.

Selections, all with as many tokens as EVS keeps at the budget (never less than a frame): ``evs``;
``kmedoids``, by segments of two frames (CenterCLIP's operator, on these features); ``divprune``, on
all tokens of the clip; ``even`` and ``random``; ``frames``, evenly spaced whole frames, as many as
fit. These are counts of tokens; they say nothing of the accuracy of an answer.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tokprune.eval.benchmarks.mini.world import GRID, PATCH
from tokprune.eval.benchmarks.mini_video import MiniVideoBenchmark
from tokprune.eval.benchmarks.mini_video.render import NOISE, changed, evidence, render
from tokprune.operators.diversity import divprune
from tokprune.operators.segments import segment_reduce, sparse_positions
from tokprune.operators.temporal import evs, evs_count, temporal_change

#: frames of a segment for k-medoids
SEGMENT = 2
#: thresholds on EVS's change, for "threshold → count"
THRESHOLDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)


@dataclass(frozen=True)
class Sample:
    """One clip: ``x`` [T, n, d] features; ``changed``, ``evidence`` [T · n] bool."""

    task: str
    x: Tensor
    changed: Tensor
    evidence: Tensor

    @property
    def later(self) -> Tensor:
        """[T · n] bool: tokens after the first frame."""
        frames, n = self.x.shape[:2]
        return torch.arange(frames * n) >= n


# ---------------------------------------------------------------------- features


def pixel_features(frames: list[Any]) -> Tensor:
    """[T, n, 192]: the pixels of every patch, in [-1, 1]."""
    pixels = np.stack([np.asarray(frame, dtype=np.float32) for frame in frames]) / 127.5 - 1
    patches = pixels.reshape(len(frames), GRID, PATCH, GRID, PATCH, 3).transpose(0, 1, 3, 2, 4, 5)
    return torch.from_numpy(patches.reshape(len(frames), GRID * GRID, -1).copy())


def mini_features() -> Callable[[list[Any]], Tensor]:
    """[T, n, d]: every frame through the embedded model's tower and projector, as a picture."""
    import tokprune

    model, processor = tokprune.load("mini", processor=True)
    model.eval()

    @torch.no_grad()
    def features(frames: list[Any]) -> Tensor:
        pixels = processor.image_processor(frames, return_tensors="pt")["pixel_values"]
        config = model.config
        states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        return model.model.multi_modal_projector(states[config.vision_feature_layer][:, 1:]).float()

    return features


# ---------------------------------------------------------------------- selections


def _even(x: Tensor, k: int) -> Tensor:
    return torch.tensor(sparse_positions(x.shape[0] * x.shape[1], k))


def _random(x: Tensor, k: int) -> Tensor:
    return torch.randperm(x.shape[0] * x.shape[1])[:k]  # another one for every clip


def _frames(x: Tensor, k: int) -> Tensor:
    n = x.shape[1]
    whole = torch.tensor(sparse_positions(x.shape[0], k // n))
    return (whole[:, None] * n + torch.arange(n)).flatten()


def _divprune(x: Tensor, k: int) -> Tensor:
    return divprune(x.flatten(0, 1), k)


def _kmedoids(x: Tensor, k: int) -> Tensor:
    """Segments get equal shares, rounded down."""
    segments = x.shape[0] // SEGMENT
    found = segment_reduce(x[None], segments, k // segments, class_token=False).medoids
    assert found is not None
    return (found[0] + torch.arange(segments)[:, None] * SEGMENT * x.shape[1]).flatten()


SELECTIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "evs": evs,
    "kmedoids": _kmedoids,
    "divprune": _divprune,
    "even": _even,
    "random": _random,
    "frames": _frames,
}


# ---------------------------------------------------------------------- figures


def kept(sample: Sample, selection: str, keep: float) -> Tensor:
    """[T · n] bool: the tokens that stay."""
    frames, n = sample.x.shape[:2]
    mask = torch.zeros(frames * n, dtype=torch.bool)
    mask[SELECTIONS[selection](sample.x, evs_count(keep, frames, n))] = True
    return mask


def figures(sample: Sample, mask: Tensor) -> dict[str, float]:
    """Shares of a clip: tokens kept; of changed patches, of unchanged ones (first frame aside), of
    evidence kept; whether all evidence is."""
    still = sample.later & ~sample.changed
    return {
        "tokens": _share(mask, torch.ones_like(mask)),
        "changed": _share(mask, sample.changed),
        "unchanged": _share(mask, still),
        "evidence": _share(mask, sample.evidence),
        "all_evidence": float(mask[sample.evidence].all()),
    }


def _share(mask: Tensor, of: Tensor) -> float:
    return float(mask[of].float().mean())


def detection(samples: list[Sample]) -> dict[str, Any]:
    """EVS's change as a detector: its ROC area over all tokens after the first frames, and what a
    threshold would keep (the first frame included)."""
    change = torch.cat([temporal_change(s.x).flatten()[s.later] for s in samples])
    truth = torch.cat([s.changed[s.later] for s in samples])
    frames = samples[0].x.shape[0]
    return {
        "roc_area": _roc_area(change, truth),
        "thresholds": [
            {
                "threshold": t,
                "tokens": (1 + (frames - 1) * float((change >= t).float().mean())) / frames,
                "changed": _share(change >= t, truth),
                "unchanged": _share(change >= t, ~truth),
            }
            for t in THRESHOLDS
        ],
    }


def _roc_area(score: Tensor, truth: Tensor) -> float:
    """Chance that a true one scores higher than a false one, ties one half."""
    low = score[~truth].sort().values
    high = score[truth]
    below = torch.searchsorted(low, high, right=False)
    upto = torch.searchsorted(low, high, right=True)
    return float((below + upto).double().mean() / 2 / len(low))


def load_samples(
    split: str, clips: int, features: Callable[[list[Any]], Tensor]
) -> Iterator[Sample]:
    benchmark = MiniVideoBenchmark()
    for item in benchmark.items(split, limit=clips * len(benchmark.tasks)):
        clip = benchmark.clip(item)
        truth = [torch.from_numpy(what(clip)).flatten() for what in (changed, evidence)]
        yield Sample(item.task, features(render(clip)), *truth)


def measure(samples: list[Sample], budgets: list[Fraction]) -> dict[str, Any]:
    """All figures, as they go into the JSON file."""
    torch.manual_seed(0)
    rows = []
    for selection in SELECTIONS:
        for keep in budgets:
            own = [(s.task, figures(s, kept(s, selection, float(keep)))) for s in samples]
            tasks = dict.fromkeys(task for task, _ in own)
            rows.append({
                "selection": selection,
                "keep": str(keep),
                **_mean([f for _, f in own]),
                "tasks": {t: _mean([f for task, f in own if task == t]) for t in tasks},
            })  # fmt: skip
    return {
        "clips": len(samples),
        "changed_share": sum(_share(s.changed, s.later) for s in samples) / len(samples),
        "detection": detection(samples),
        "rows": rows,
    }


def _mean(found: list[dict[str, float]]) -> dict[str, float]:
    """Means over clips, and half the width of a 95 % interval of the evidence's."""
    told = {name: sum(f[name] for f in found) / len(found) for name in found[0]}
    spread = np.std([f["evidence"] for f in found], ddof=1) if len(found) > 1 else math.nan
    return {**told, "evidence_ci": 1.96 * float(spread) / math.sqrt(len(found))}


# ---------------------------------------------------------------------- output


def show(told: dict[str, Any], console: Console) -> None:
    percent = "{:.1f}".format
    table = Table(title=f"{told['clips']} clips, {told['features']}; all in %")
    names = ("selection", "keep", "tokens", "changed", "unchanged", "evidence", "all evidence")
    tasks = list(told["rows"][0]["tasks"])
    for name in (*names, *tasks):
        table.add_column(name, justify="left" if name == "selection" else "right")
    for row in told["rows"]:
        table.add_row(
            row["selection"], row["keep"],
            *(percent(100 * row[name]) for name in ("tokens", "changed", "unchanged")),
            f"{100 * row['evidence']:.1f} ± {100 * row['evidence_ci']:.1f}",
            percent(100 * row["all_evidence"]),
            *(percent(100 * row["tasks"][task]["evidence"]) for task in tasks),
            end_section=row["keep"] == told["rows"][-1]["keep"],
        )  # fmt: skip
    console.print(table)
    console.print("right of 'all evidence': evidence kept, by type of question")
    found = told["detection"]
    table = Table(title="EVS's change as a threshold; all but the threshold in %")
    for name in ("threshold", "tokens", "changed", "unchanged"):
        table.add_column(name, justify="right")
    for row in found["thresholds"]:
        shares = (percent(100 * row[name]) for name in ("tokens", "changed", "unchanged"))
        table.add_row(str(row["threshold"]), *shares)
    console.print(table)
    console.print(
        f"{100 * told['changed_share']:.1f} % of patches change from frame to frame; ROC area of "
        f"EVS's change: {found['roc_area']:.4f}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", choices=("pixels", "mini"), default="pixels")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--clips", type=int, default=20, help="of each type of question")
    parser.add_argument("--keep", default="1/2,1/4,3/16,5/32", help="budgets, by commas")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    try:
        budgets = [Fraction(keep) for keep in options.keep.split(",")]
    except (ValueError, ZeroDivisionError):
        parser.error(f"--keep={options.keep} should be fractions like 1/2,1/4")
    if not all(0 < keep <= 1 for keep in budgets):
        parser.error(f"--keep={options.keep} should be above 0 and at most 1")
    if options.clips < 1:
        parser.error(f"--clips={options.clips} should be at least 1")
    features = pixel_features if options.features == "pixels" else mini_features()
    told = {
        "features": options.features,
        "split": options.split,
        "noise": NOISE,
        **measure(list(load_samples(options.split, options.clips, features)), budgets),
    }
    show(told, Console(width=150))
    if options.json:
        options.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
