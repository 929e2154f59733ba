"""Cluster bootstrap of accuracies: images are drawn, not questions.

Questions about one image share its difficulties, so they are no independent draws. One set of
resamples serves every variant, which makes differences between variants paired.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

#: a stratum needs as many images to be drawn from on its own
_SMALLEST_STRATUM = 20
_CHUNK = 500


class Resampler:
    """Fixed resamples of a set of questions.

    Images are drawn with replacement within strata: images that carry questions of the same
    tasks. Where each image has questions of one task, this is the bootstrap stratified over
    tasks; strata of fewer than 20 images are joined.

    Args:
        images: [items] image of each question.
        tasks: [items] task of each question.
        draws: number of resamples.
        seed: of the generator; the same questions in the same order give the same resamples.
    """

    def __init__(
        self, images: Sequence[str], tasks: Sequence[str], draws: int = 4000, seed: int = 0
    ) -> None:
        if len(images) != len(tasks):
            raise ValueError(f"{len(images)} images and {len(tasks)} tasks should be as many")
        if draws < 1:
            raise ValueError(f"draws={draws!r} should be at least 1")
        self.draws = draws
        self.tasks = np.asarray(tasks, dtype=object)
        names = sorted(set(images))
        number = {name: n for n, name in enumerate(names)}
        self.group = np.array([number[i] for i in images], dtype=np.int64)
        self.groups = len(names)
        self._weights = _draw(_strata(self.group, self.tasks, self.groups), draws, seed)

    def task_means(
        self, score: Floats, names: Sequence[str], chunk: int = _CHUNK
    ) -> tuple[Floats, Floats]:
        """Mean score per task, as measured and resampled.

        Args:
            score: [items, variants], NaN = no answer.
            names: tasks to report.
            chunk: resamples at a time; bounds the memory.

        Returns:
            [tasks, variants] and [draws, tasks, variants]; NaN where a task has no answer.
        """
        score = np.asarray(score, float)
        variants = score.shape[1]
        means = np.full((len(names), variants), np.nan)
        samples = np.full((self.draws, len(names), variants), np.nan)
        for t, name in enumerate(names):
            rows = np.flatnonzero(self.tasks == name)
            if not len(rows):
                continue
            used, local = np.unique(self.group[rows], return_inverse=True)
            answered = ~np.isnan(score[rows])
            sums, counts = np.zeros((len(used), variants)), np.zeros((len(used), variants))
            np.add.at(sums, local, np.where(answered, score[rows], 0.0))
            np.add.at(counts, local, answered)
            means[t] = _ratio(sums.sum(0), counts.sum(0))
            same = bool((counts == counts[:, :1]).all())
            for start in range(0, self.draws, chunk):
                weights = self._weights[start : start + chunk, used].astype(np.float64)
                total = weights @ (counts[:, :1] if same else counts)
                samples[start : start + chunk, t] = _ratio(weights @ sums, total)
        return means, samples


def macro(means: Floats) -> Floats:
    """Mean over the tasks of [tasks, variants] → [variants], NaN where one lacks a task."""
    return means.mean(0) if means.shape[0] else np.full(means.shape[1:], np.nan)


def macro_samples(samples: Floats) -> Floats:
    """The same for resamples: [draws, tasks, variants] → [draws, variants].

    A resample can miss a small task; its macro average is that of the others.
    """
    answered = ~np.isnan(samples)
    lacking = ~answered.any(0)  # no answer in any resample: the variant lacks the task
    total, n = np.where(answered, samples, 0.0).sum(1), answered.sum(1)
    mean = _ratio(total, n)
    mean[:, lacking.any(0)] = np.nan
    return mean


def interval(samples: Floats, estimate: float, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of [draws] resamples, widened to hold the estimate itself."""
    answered = samples[~np.isnan(samples)]
    if np.isnan(estimate) or not len(answered):
        return float("nan"), float("nan")
    low, high = np.quantile(answered, [(1 - level) / 2, (1 + level) / 2])
    return min(float(low), estimate), max(float(high), estimate)


def _ratio(total: Floats, n: Floats) -> Floats:
    total, n = np.broadcast_arrays(total, n)
    return np.divide(total, n, out=np.full(total.shape, np.nan), where=n > 0)


def _strata(group: NDArray[np.int64], tasks: NDArray[np.object_], groups: int) -> list[list[int]]:
    """Images with the same set of tasks, small sets joined."""
    carried: list[set[str]] = [set() for _ in range(groups)]
    for g, task in zip(group.tolist(), tasks.tolist()):
        carried[g].add(task)
    sets: dict[tuple[str, ...], list[int]] = {}
    for g, names in enumerate(carried):
        sets.setdefault(tuple(sorted(names)), []).append(g)
    large = [members for _, members in sorted(sets.items()) if len(members) >= _SMALLEST_STRATUM]
    small = [members for _, members in sorted(sets.items()) if len(members) < _SMALLEST_STRATUM]
    rest = [g for members in small for g in members]
    if rest and large and len(rest) < _SMALLEST_STRATUM:
        # a handful of images alone would hardly vary
        large[0] = large[0] + rest
        rest = []
    return large + ([rest] if rest else [])


def _draw(strata: list[list[int]], draws: int, seed: int) -> NDArray[np.uint16]:
    """[draws, images]: how often each image is drawn."""
    rng = np.random.default_rng(seed)
    weights = np.zeros((draws, sum(map(len, strata))), dtype=np.uint16)
    for members in strata:
        n = len(members)
        weights[:, members] = rng.multinomial(n, np.full(n, 1 / n), size=draws)
    return weights
