"""What vLLM's attention for the CPU leaves out and its backends for GPUs have: tokens of an image
that see each other both ways, in the ranges that its runner finds."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from vllm.v1.attention.backends import cpu_attn


def install(patch: pytest.MonkeyPatch) -> None:
    """Compute the rows of images once more, with all of their image in view."""
    build, forward = (
        cpu_attn.CPUAttentionMetadataBuilder.build,
        cpu_attn.CPUAttentionBackendImpl.forward,
    )
    #: by layer, keys and values by their slot
    known: dict[int, dict[int, Any]] = {}

    @functools.wraps(build)
    def built(self: Any, prefix: int, common: Any, fast_build: bool = False) -> Any:
        made = build(self, prefix, common, fast_build)
        made.ranges, made.block = common.mm_req_doc_ranges, self.block_size
        return made

    @functools.wraps(forward)
    def forwarded(
        self: Any, layer: Any, query: Any, key: Any, value: Any, cache: Any, meta: Any, output: Any,
        *rest: Any, **more: Any,
    ) -> Any:  # fmt: skip
        forward(self, layer, query, key, value, cache, meta, output, *rest, **more)
        if meta is None or getattr(meta, "ranges", None) is None:
            return output
        own = known.setdefault(id(self), {})
        slots = meta.slot_mapping[: meta.num_actual_tokens].tolist()
        for n, slot in enumerate(slots):
            own[slot] = (key[n].clone(), value[n].clone())
        starts, lengths = meta.query_start_loc.tolist(), meta.seq_lens.tolist()
        for request, ranges in meta.ranges.items():
            length, start = lengths[request], starts[request]
            computed = length - (starts[request + 1] - start)
            blocks = meta.block_table[request].tolist()
            for first, last in ranges:
                for at in range(max(first, computed), min(last + 1, length)):
                    back = 0 if self.sliding_window < 0 else max(0, at + 1 - self.sliding_window)
                    seen = sorted({*range(back, at + 1), *range(first, last + 1)})
                    pairs = [own[blocks[p // meta.block] * meta.block + p % meta.block]
                             for p in seen]  # fmt: skip
                    k, v = (torch.stack(part, dim=1) for part in zip(*pairs))
                    q = query[start + at - computed][:, None]
                    times = q.shape[0] // k.shape[0]
                    k, v = k.repeat_interleave(times, 0), v.repeat_interleave(times, 0)
                    weight = (q @ k.mT * self.scale).softmax(-1)
                    output[start + at - computed] = (weight @ v)[:, 0]
        return output

    patch.setattr(cpu_attn.CPUAttentionMetadataBuilder, "build", built)
    patch.setattr(cpu_attn.CPUAttentionBackendImpl, "forward", forwarded)
    patch.setattr(cpu_attn.CPUAttentionBackend, "supports_mm_prefix", classmethod(lambda cls: True))
