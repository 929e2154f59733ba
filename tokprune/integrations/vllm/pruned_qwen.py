"""Qwen's models in vLLM: images of any size, and positions of three axes, which stay the original
ones; videos keep all their tokens."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.interfaces import SupportsMultiModalPruning
from vllm.multimodal.processing import InputProcessingContext
from vllm.platforms import current_platform

from tokprune.engine.model import ImageLayout
from tokprune.families.grids import grid_images
from tokprune.families.pieces import spans
from tokprune.integrations.vllm.cpu import wrap_runner
from tokprune.integrations.vllm.engine import check_engine, say
from tokprune.integrations.vllm.host import Left
from tokprune.integrations.vllm.hosts import Hosts
from tokprune.integrations.vllm.mrope import (
    LARGEST,
    Media,
    grids,
    placed,
    prompt_positions,
    with_places,
    without_places,
)
from tokprune.integrations.vllm.processor import Counting
from tokprune.integrations.vllm.pruned import Pruned

if not hasattr(SupportsMultiModalPruning, "recompute_mrope_positions"):
    raise ImportError(
        "this release of vLLM no longer asks models for the positions of what is left of an image; "
        "tokprune cannot prune Qwen's models in it"
    )
if current_platform.is_cpu():
    wrap_runner()


class WholeVideos(InputProcessingContext):
    """Our model sets a rate for its runner to read; where both share a process, what counts the
    tokens of a prompt must not read it."""

    def get_mm_config(self) -> Any:
        config = copy.copy(super().get_mm_config())
        config.video_pruning_rate = None
        return config


class QwenCounting(Counting):
    per_image = "image_grid_thw"

    def __init__(self, info: Any, dummy_inputs: Any) -> None:
        super().__init__(info, dummy_inputs)
        if self.hosts.own is not None:
            info.ctx = WholeVideos(info.ctx.model_config, info.ctx.tokenizer)

    def layout_of(self, images: Any, number: int, out: Any) -> ImageLayout:
        grid = out["image"][number]["image_grid_thw"].data
        (layout,) = layouts(self.hosts, grid[None])
        return layout


def layouts(hosts: Hosts, thw: Tensor) -> list[ImageLayout]:
    """Of images by their grids [n, 3], (1, height, width) in patches."""
    merge = hosts.bound.model.config.vision_config.spatial_merge_size
    found = grid_images(thw, merge)
    for layout in found:
        height, width = grid_of(layout)
        if max(height, width) > LARGEST:
            raise ValueError(
                f"tokprune in vLLM: an image of {height}×{width} tokens is larger than {LARGEST} "
                "each way, which is what positions can tell apart; make it smaller"
            )
    return found


def grid_of(layout: ImageLayout) -> tuple[int, int]:
    """(height, width) in tokens."""
    assert layout.token_grid is not None
    return layout.token_grid.grids[0]


class PrunedQwen(Pruned):
    """Before a model whose encoder packs its images."""

    #: lets the runner ask for positions
    supports_multimodal_pruning = True

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        hosts = Hosts(vllm_config.model_config.hf_config)
        check_engine(vllm_config, hosts)
        #: positions come with the features
        self.tokprune_positions = hosts.own is not None
        if self.tokprune_positions:
            # the runner asks for positions only where videos are pruned; they keep all of theirs
            vllm_config.model_config.multimodal_config.video_pruning_rate = 1e-9
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.hosts = hosts
        #: tokens of the images that the encoder runs at a time
        self.at_once = int(vllm_config.scheduler_config.max_num_batched_tokens)
        say(hosts)

    # ------------------------------------------------------------------ features

    def _process_image_input(self, image_input: Any) -> Any:
        if not self.tokprune_positions:
            return super()._process_image_input(image_input)
        thw = image_input["image_grid_thw"]
        features = self._encode(image_input, thw)
        hosts = self.hosts_of(len(thw))
        if image_input["type"] != "pixel_values":  # features of a client's own
            hosts = [None] * len(thw)
        result = []
        for layout, host, own in zip(layouts(self.hosts, thw), hosts, features, strict=True):
            if host is None:
                left = Left(own, torch.arange(len(own), device=own.device))
            else:
                (left,) = self.unusable(host, [layout], own) or [self.reduced(host, layout, own)]
                self.watch([left])
            result.append(with_places(left.features, left.place, grid_of(layout)[1]))
        return tuple(result)

    def reduced(self, host: Any, layout: ImageLayout, features: Tensor) -> Left:
        """What is left of an image, by the features [n, D] that its encoder made."""
        (left,) = host.reduce([layout], [features])
        return left  # type: ignore[no-any-return]

    def _encode(self, given: Any, thw: Tensor) -> list[Tensor]:
        """Features of every image, of a few at a time."""
        if given["type"] != "pixel_values":
            return list(super()._process_image_input(given))
        sizes = thw.prod(-1).tolist()
        merge = self.config.vision_config.spatial_merge_size
        found: list[Tensor] = []
        for first, last in spans(sizes, self.at_once * merge**2):
            rows = slice(sum(sizes[:first]), sum(sizes[:last]))
            own = {
                "type": given["type"], "pixel_values": given["pixel_values"][rows],
                "image_grid_thw": thw[first:last],
            }  # fmt: skip
            found += super()._process_image_input(own)
        return found

    def _process_video_input(self, video_input: Mapping[str, Any]) -> Any:
        found = super()._process_video_input(video_input)
        if not self.tokprune_positions:
            return found
        return tuple(without_places(own) for own in found)

    # ------------------------------------------------------------------ positions

    def media(self, features: Any) -> Iterable[Media]:
        """Images and videos of a prompt, in order."""
        return grids(self, features)

    def get_mrope_input_positions(self, input_tokens: Any, mm_features: Any) -> Any:
        if not self.tokprune_positions:
            return super().get_mrope_input_positions(input_tokens, mm_features)
        return prompt_positions(len(input_tokens), self.media(mm_features))

    def recompute_mrope_positions(
        self, input_ids: Any, multimodal_embeddings: Any, mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> Any:  # fmt: skip
        if not self.tokprune_positions:
            return super().recompute_mrope_positions(
                input_ids, multimodal_embeddings, mrope_positions, num_computed_tokens
            )
        ids = torch.as_tensor(input_ids, device=mrope_positions.device)
        ids = ids[: mrope_positions.shape[1]]
        media = (ids == self.config.image_token_id) | (ids == self.config.video_token_id)
        return placed(mrope_positions, media, num_computed_tokens, multimodal_embeddings)


class WithoutEVS(PrunedQwen):
    """Before a model that can drop tokens of videos itself: features have their places already."""

    def _postprocess_image_embeds_evs(self, image_embeds_split: Any, image_input: Any) -> Any:
        if self.tokprune_positions:
            return image_embeds_split
        return super()._postprocess_image_embeds_evs(image_embeds_split, image_input)

    def _postprocess_video_embeds_evs(self, video_embeds_split: Any, video_input: Any) -> Any:
        if self.tokprune_positions:
            return video_embeds_split
        return super()._postprocess_video_embeds_evs(video_embeds_split, video_input)
