"""Models whose vision encoder merges patches to tokens, so that no method looks into it: what their
projector makes of tiles is reduced."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from tokprune.engine.model import ImageLayout
from tokprune.families.pieces import spans
from tokprune.integrations.vllm.engine import check_engine, say
from tokprune.integrations.vllm.hosts import Hosts
from tokprune.integrations.vllm.pruned import Pruned


class PrunedProjected(Pruned):
    """Before such a model."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.hosts = Hosts(self.config)
        check_engine(vllm_config, self.hosts)
        #: tiles that the encoder runs at a time
        self.at_once = max(
            1, vllm_config.scheduler_config.max_num_batched_tokens // self.runs(1)[0].count
        )
        say(self.hosts)

    def runs(self, tiles: int) -> list[ImageLayout]:
        """The runs of placeholders of an image of so many tiles, each of which is reduced by
        itself."""
        return [self.hosts.tiles(tiles)]

    def tiles_left(
        self, given: Mapping[str, Any], encode: Callable[[dict[str, Any]], Iterable[Tensor]]
    ) -> list[Tensor]:
        """What is left of images by their ``pixel_values`` [tiles, 3, H, W] and ``num_patches``
        [images], tiles of each; ``encode`` is the model's own way to features."""
        pixels, number = given["pixel_values"], torch.as_tensor(given["num_patches"])
        sizes = number.tolist()
        hosts = self.hosts_of(len(sizes))
        features: list[Tensor] = []
        for first, last in spans(sizes, self.at_once):
            own = pixels[sum(sizes[:first]) : sum(sizes[:last])]
            features += encode(
                {"type": "pixel_values", "pixel_values": own, "num_patches": number[first:last]}
            )
        result = []
        for host, tiles, own in zip(hosts, sizes, features, strict=True):
            if host is None:
                result.append(own)
                continue
            layouts = self.runs(tiles)
            left = self.unusable(host, layouts, own)
            if left is None:
                left = host.reduce(layouts, own.split([layout.count for layout in layouts]))
            self.watch(left)
            result.append(torch.cat([part.features for part in left]))
        return result
