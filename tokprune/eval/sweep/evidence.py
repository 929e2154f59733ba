"""What tells afterwards whether a method acted on an answer, and on the same input as the others.

Every row has it; :mod:`tokprune.eval.sweep.gate` compares it with that of the unpruned model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokprune.trace import PrefillTrace

#: logits of the first answer token that are kept
TOP = 8


class FirstLogits:
    """A logits processor that changes nothing. It keeps the largest logits of the first token of
    every answer, and whether all of all tokens were numbers; nothing is read from the device before
    it is asked for."""

    def __init__(self) -> None:
        self._top: Any = None
        self._finite: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # −infinity is what other processors put on tokens that must not come
        finite = (scores < torch.inf).all(1)
        if self._finite is None:
            self._top = scores.float().topk(min(TOP, scores.shape[1]), dim=1)
            self._finite = finite
        else:
            self._finite = self._finite & finite
        return scores

    def rows(self) -> list[tuple[list[int], list[float], bool]]:
        """Of every answer: ids and logits, the largest first, and whether all were numbers."""
        assert self._finite is not None
        ids, values = self._top.indices.tolist(), self._top.values.tolist()
        return list(zip(ids, values, self._finite.tolist(), strict=True))


def cache_entries(cache: Any, generated: int) -> float | None:
    """Tokens of the prompt that the cache held, padding included, in the mean of its layers; read
    from its tensors, whatever a trace says. None for a cache of another kind.

    Args:
        cache: as ``generate`` returns it.
        generated: tokens of its answers; the last of them is not cached.
    """
    keys = [getattr(layer, "keys", None) for layer in getattr(cache, "layers", ())]
    lengths = [own.shape[-2] for own in keys if isinstance(own, Tensor) and own.dim() == 4]
    return sum(lengths) / len(lengths) - generated + 1 if lengths else None


def kept_digests(prefill: PrefillTrace) -> list[str]:
    """Of every prompt, a digest of the visual tokens in each decoder layer: equal where the same
    columns of the prompt were kept."""
    rows: list[Any] = [hashlib.blake2b(digest_size=8) for _ in prefill.original_lengths]
    before = None
    for number, layer in enumerate(prefill.layers):
        if layer.counts == before:
            continue
        before = layer.counts
        kept = torch.where(layer.segment >= 0, layer.column, -1).tolist()
        for row, columns in zip(rows, kept, strict=True):
            row.update(repr((number, [c for c in columns if c >= 0])).encode())
    return [row.hexdigest() for row in rows]


def input_digest(ids: Iterable[int], visuals: Iterable[Any]) -> str:
    """Digest of a prompt: its token ids without padding, and its images or frames as the processor
    was given them."""
    found = hashlib.blake2b(repr(list(ids)).encode(), digest_size=8)
    for visual in visuals:
        found.update(repr((getattr(visual, "size", None), getattr(visual, "mode", None))).encode())
        found.update(visual.tobytes())
    return found.hexdigest()


@dataclass(frozen=True)
class Evidence:
    """Of one answer. ``inputs``: of :func:`input_digest`, None where images are made smaller on
    purpose; ``kept``: of :func:`kept_digests`, None without a method; ``cache``: of
    :func:`cache_entries`; ``ids``, ``logits``: the largest of the first answer token; ``finite``:
    no logit of any token was NaN or infinite; ``images``: in the prompt (1 for a video);
    ``places``: of :func:`tokprune.eval.sweep.places.kept_places`, for some of the questions."""

    inputs: str | None
    kept: str | None
    cache: float | None
    ids: list[int]
    logits: list[float]
    finite: bool
    images: int
    places: dict[str, list[int]] | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "inputs": self.inputs,
            "kept": self.kept,
            "cache": None if self.cache is None else round(self.cache, 3),
            "ids": self.ids,
            # JSON has no NaN
            "logits": [round(v, 4) if abs(v) < float("inf") else None for v in self.logits],
            "finite": self.finite,
            "images": self.images,
            **({} if self.places is None else {"places": self.places}),
        }
