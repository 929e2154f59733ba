"""Models of a GPU check: published shapes with random weights, or tiny ones in a rehearsal."""

from __future__ import annotations

import gc
from typing import Any

import torch

#: tiny models of the same families, from :mod:`tokprune.testing`
_TINY = {"llava-1.5": "llava-1.5", "llava-next": "llava-next", "qwen2.5": "qwen2.5-vl",
         "qwen3": "qwen3-vl"}  # fmt: skip


class Models:
    """Makes every model once and keeps it as long as there is room for the next."""

    def __init__(self, device: torch.device, tiny: bool) -> None:
        self.device, self.tiny = device, tiny
        self._made: dict[str, Any] = {}

    def get(self, shape: str) -> Any:
        """A model in evaluation mode: bfloat16 on CUDA, float32 elsewhere.

        Raises:
            MemoryError: it does not fit, alone either.
        """
        key = shape.removesuffix("-1792px").removesuffix("-video")  # the same weights
        if key not in self._made:
            self._made[key] = self._make(key)
        return self._made[key]

    def picture(self, shape: str) -> tuple[Any, int]:
        """The image and the number of frames that the shape is measured with."""
        from tokprune.bench.models import frames_of, image_of
        from tokprune.bench.prompts import default_image

        if self.tiny:
            return default_image((40, 40)), 4 if frames_of(shape) else 0
        # four crops and none of them padding: 5 × 576 patches, and a newline a row
        square = default_image((672, 672)) if shape.startswith("llava-next") else None
        return square or image_of(shape), frames_of(shape)

    def _make(self, shape: str) -> Any:
        from tokprune.bench.models import random_model
        from tokprune.testing import tiny_family

        if self.tiny:
            return tiny_family(next(n for p, n in _TINY.items() if shape.startswith(p))).build()
        kind = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        try:
            return random_model(shape, dtype=kind, device=self.device)
        except MemoryError:
            if not self._made:
                raise
            self.clear()
            return random_model(shape, dtype=kind, device=self.device)

    def clear(self) -> None:
        self._made.clear()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
