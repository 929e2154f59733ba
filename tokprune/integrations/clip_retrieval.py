"""Features of video frames from a CLIP vision model that clusters tokens on the way: CenterCLIP."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokprune.errors import UnsupportedModelError
from tokprune.families.base import encoder_layers_of, tower_has_cls
from tokprune.operators.segments import (
    Aggregate,
    Clusterer,
    Reduced,
    segment_bounds,
    segment_reduce,
)


@dataclass(frozen=True, eq=False)
class FrameFeatures:
    """What :func:`reduce_frames` makes of B videos: S segments of 1 + K tokens each."""

    #: [B, S, 1 + K, D] output of the last layer, class token first, then the kept tokens by frame
    #: and place
    last_hidden_state: Tensor
    #: [B, S, D] class token after the final norm
    class_features: Tensor
    #: [B, S, P] its projection, None for models without one
    embeds: Tensor | None
    #: [B, S] bool, segments that are no padding
    mask: Tensor
    #: for each clustering layer its number and what was kept there
    reductions: tuple[tuple[int, Reduced], ...]

    def pooled(self, normalize: bool = False) -> Tensor:
        """One vector per video: the mean of its real segments.

        Args:
            normalize: scale each segment's vector to length one before the mean, and the mean
                after it, as retrieval by cosine does.

        Returns:
            [B, P] from ``embeds``, or [B, D] from ``class_features`` where there are none; zero for
            a video that is all padding.
        """
        x = self.class_features if self.embeds is None else self.embeds
        scaled = nn.functional.normalize(x, dim=-1) if normalize else x
        weight = self.mask[..., None].to(x.dtype)
        mean = (scaled * weight).sum(1) / weight.sum(1).clamp(min=1)
        return nn.functional.normalize(mean, dim=-1) if normalize else mean


def reduce_frames(
    model: nn.Module,
    pixel_values: Tensor,
    *,
    segments: int | Sequence[int] = 4,
    keep: int | Sequence[int] = 49,
    layer: int | Sequence[int] | None = None,
    clusterer: Clusterer | None = None,
    aggregate: Aggregate | None = None,
    frame_mask: Tensor | None = None,
) -> FrameFeatures:
    """Run a CLIP vision model on videos, and cluster the frames' tokens before one of its layers.

    From there on every segment of consecutive frames is one sequence of its class token (mean of
    the frames') and ``keep`` tokens. Hooks do it and are taken out again, whatever happens; calls
    of the same model from other threads are left alone. Use ``torch.no_grad()`` for inference:
    gradients flow otherwise, as the paper's fine-tuning needs.

    Published (after fine-tuning for retrieval): the default layer; ViT-B/32: 12 frames in 6, 4 or 3
    segments of 49 tokens; ViT-B/16: 12 frames in 4 segments of 160.

    Args:
        model: ``CLIPVisionModel``, ``CLIPVisionModelWithProjection``, ``CLIPModel`` or its
            ``vision_model``, from transformers.
        pixel_values: [B, T, 3, H, W], frames in order, as the image processor makes them.
        segments: S, at most T; the last takes the frames that are left over. For several
            clustering layers, falling numbers.
        keep: K, tokens of each segment, at most those of ⌊T/S⌋ frames. For several layers, numbers
            that do not rise.
        layer: 0-based layer that first sees the clusters' tokens, or several, rising; None: ⌈L/2⌉
            of L layers.
        clusterer: how to cluster (None: k-medoids); also the baselines.
        aggregate: None keeps medoids as they are; "mean" averages each cluster.
        frame_mask: [B, T] bool, False for padding at a video's end; None: all real. Padding is
            clustered like any frame; a segment is padding when its last frame is.

    Returns:
        :class:`FrameFeatures`, in the model's dtype.

    Raises:
        UnsupportedModelError: not a CLIP vision model.
        ValueError: an argument has a wrong shape, does not fit the others or the model.

    Source: Zhao et al., "CenterCLIP: Token Clustering for Efficient Text-Video Retrieval", SIGIR
    2022, arXiv 2205.00823.

    Example::

        with torch.no_grad():
            video = tokprune.reduce_frames(clip, pixels, segments=4).pooled(normalize=True)
    """
    tower, projection = _clip_tower(model)
    layers = encoder_layers_of(tower)
    if pixel_values.dim() != 5:
        raise ValueError(
            f"pixel_values has shape {tuple(pixel_values.shape)}; it should be [B, T, 3, H, W]"
        )
    batch, frames = pixel_values.shape[:2]
    patch = tower.embeddings.patch_size
    grid = (pixel_values.shape[3] // patch, pixel_values.shape[4] // patch)
    steps = _steps(layer, segments, keep, len(layers), frames, grid[0] * grid[1])
    mask = _segment_mask(frame_mask, batch, frames, steps)
    reductions: list[tuple[int, Reduced]] = []

    def reduce(number: int, hidden: Tensor, pieces: int, tokens: int) -> Tensor:
        x = hidden.unflatten(0, (batch, -1))
        # rows have lost their places in the grid once a layer has clustered them
        own = None if reductions else grid
        new = segment_reduce(x, pieces, tokens, clusterer, aggregate=aggregate, grid=own)
        reductions.append((number, new))
        return new.hidden.flatten(0, 1)

    handles = []
    try:
        for number, pieces, tokens in steps:
            hook = _hook(reduce, number, pieces, tokens)
            handles.append(layers[number].register_forward_pre_hook(hook, with_kwargs=True))
        out = tower(pixel_values=pixel_values.flatten(0, 1))
    finally:
        for handle in handles:
            handle.remove()
    class_features = out.pooler_output.unflatten(0, (batch, -1))
    return FrameFeatures(
        last_hidden_state=out.last_hidden_state.unflatten(0, (batch, -1)),
        class_features=class_features,
        embeds=None if projection is None else projection(class_features),
        mask=mask.to(class_features.device),
        reductions=tuple(reductions),
    )


def _hook(reduce: Callable[..., Tensor], number: int, pieces: int, tokens: int) -> Any:
    thread = threading.get_ident()

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() != thread:
            return None
        if args:
            return (reduce(number, args[0], pieces, tokens), *args[1:]), kwargs
        hidden = reduce(number, kwargs["hidden_states"], pieces, tokens)
        return args, {**kwargs, "hidden_states": hidden}

    return hook


def _clip_tower(model: Any) -> tuple[Any, Any]:
    """The module that turns pixels into tokens, and the projection of its class token or None.

    Raises:
        UnsupportedModelError: the model has no class token, or is no vision model of that shape.
    """
    tower = getattr(model, "vision_model", model)
    whole = all(hasattr(tower, name) for name in ("embeddings", "encoder", "post_layernorm"))
    if not whole or not tower_has_cls(tower):
        raise UnsupportedModelError(
            f"model {type(model).__name__} is not a CLIP vision model; it should be a "
            "CLIPVisionModel, CLIPVisionModelWithProjection, CLIPModel or its vision_model"
        )
    return tower, getattr(model, "visual_projection", None)


def _steps(
    layer: int | Sequence[int] | None,
    segments: int | Sequence[int],
    keep: int | Sequence[int],
    layers: int,
    frames: int,
    tokens: int,
) -> list[tuple[int, int, int]]:
    """(layer, segments, tokens of each) of every clustering.

    Raises:
        ValueError: they do not fit each other, the model or the video.
    """
    layer = -(-layers // 2) if layer is None else layer
    given = {"layer": layer, "segments": segments, "keep": keep}
    lists = {k: [v] if isinstance(v, int) else list(v) for k, v in given.items()}
    lengths = {len(v) for v in lists.values()}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            f"layer={layer!r}, segments={segments!r} and keep={keep!r} should be single numbers, "
            "or lists of one length"
        )
    steps = list(zip(*lists.values()))
    last = -1
    for number, pieces, kept in steps:
        if not last < number < layers:
            raise ValueError(
                f"layer={layer!r} should rise and lie between 0 and {layers - 1}, the last layer "
                "of this model"
            )
        if not 1 <= pieces <= frames:
            raise ValueError(
                f"segments={segments!r} should be between 1 and the {frames} frames (or "
                "segments of the layer before)"
            )
        held = tokens * (frames // pieces)
        if not 1 <= kept <= held:
            raise ValueError(
                f"keep={keep!r} should be between 1 and the {held} tokens of a segment of "
                f"{frames // pieces} frames"
            )
        last, frames, tokens = number, pieces, kept
    return steps


def _segment_mask(
    frame_mask: Tensor | None, batch: int, frames: int, steps: Sequence[tuple[int, int, int]]
) -> Tensor:
    """[B, S]: whether the last frame of every segment is real."""
    mask = torch.ones(batch, frames, dtype=torch.bool) if frame_mask is None else frame_mask
    if mask.shape != (batch, frames) or mask.dtype != torch.bool:
        raise ValueError(
            f"frame_mask is {mask.dtype} {tuple(mask.shape)}; it should be torch.bool "
            f"[{batch}, {frames}]"
        )
    for _, pieces, _ in steps:
        ends = [stop - 1 for _, stop in segment_bounds(mask.shape[1], pieces)]
        mask = mask[:, ends]
    return mask
