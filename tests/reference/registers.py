"""A register in a vision tower, by plain hooks on an unpatched model: slow, and nothing of ours."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

Pairs = Sequence[tuple[int, int]]


def inner_tower(model: Any) -> Any:
    tower = model.model.vision_tower
    return getattr(tower, "vision_model", tower)


@contextmanager
def register_in_tower(model: Any, neurons: Pairs = (), cls: bool = True) -> Iterator[None]:
    """A row of zeros behind the embedded patches; what ``neurons`` do moves to it."""
    tower, first, channels = inner_tower(model), int(cls), defaultdict(list)
    for layer, channel in neurons:
        channels[layer].append(channel)

    def append(module: Any, args: Any, output: Tensor) -> Tensor:
        return torch.cat([output, torch.zeros_like(output[:, :1])], dim=1)

    def moved(own: list[int]) -> Any:
        def hook(module: Any, args: Any) -> Any:
            out = args[0].clone()
            for tile in out:
                for channel in own:
                    tile[-1, channel] = max(float(x) for x in tile[first:-1, channel])
                    tile[first:-1, channel] = 0
            return (out,)

        return hook

    with ExitStack() as stack:
        stack.callback(tower.embeddings.register_forward_hook(append).remove)
        for layer, own in channels.items():
            second = tower.encoder.layers[layer].mlp.fc2
            stack.callback(second.register_forward_pre_hook(moved(own)).remove)
        yield


@contextmanager
def attention_of(module: Any, seen: list[Tensor]) -> Iterator[None]:
    """Appends the maps [B, H, T, T] of an attention module under eager attention."""
    handle = module.register_forward_hook(lambda *call: seen.append(call[2][1]))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def chosen_rows(model: Any, keep: Tensor) -> Iterator[None]:
    """Of the projector's output [B, n, D] only the rows ``keep`` [B, n], equally many of each."""

    def hook(module: Any, args: Any, output: Tensor) -> Tensor:
        return torch.stack([own[rows] for own, rows in zip(output, keep)])

    handle = model.model.multi_modal_projector.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
