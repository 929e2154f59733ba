"""What the model in a worker does: encode images, and hand over what is left of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokprune.engine.model import ImageLayout
from tokprune.integrations.vllm.engine import check_engine, images_at_once, logger, say
from tokprune.integrations.vllm.host import Left, PlanHost
from tokprune.integrations.vllm.hosts import Hosts, decoded
from tokprune.integrations.vllm.processor import FIELD
from tokprune.integrations.vllm.tower import TowerHooks

if TYPE_CHECKING:
    Model = Any
else:
    Model = object


class Pruned(Model):
    """Stands before any model of vLLM, and knows the plan of every image that is encoded."""

    config: Any
    hosts: Hosts
    #: those of the requests whose images are encoded now
    _keeps: Any = None

    def embed_multimodal(self, **kwargs: Any) -> Any:
        self._keeps = kwargs.pop(FIELD, None)
        try:
            return super().embed_multimodal(**kwargs)
        finally:
            self._keeps = None

    def hosts_of(self, number: int) -> list[PlanHost | None]:
        """Of so many images; None: nothing goes."""
        if self._keeps is None:
            return [self.hosts.own] * number
        values = torch.as_tensor(self._keeps).flatten().tolist()
        return [self.hosts.of(decoded(value)) for value in values]

    @staticmethod
    def unusable(host: PlanHost, layouts: Sequence[ImageLayout], rows: Tensor) -> list[Left] | None:
        """What is left of images whose features [n, D] hold NaN or infinity; None where they are
        fine. Such rows cannot be ranked, and an error would end the server, for all who use it: as
        many are handed over as are waited for, as vLLM does without us."""
        if bool(rows.isfinite().all()):
            return None
        logger.error(
            "tokprune: image features hold NaN or infinite values, and no ranking of tokens means "
            "anything there; the first one is repeated. float16 may overflow: try bfloat16"
        )
        counts = (host.count(layout) for layout in layouts)
        return [
            Left(rows[:1].expand(n, -1), torch.zeros(n, dtype=torch.long, device=rows.device))
            for n in counts
        ]

    def watch(self, left: list[Left]) -> None:
        """What is left of some images: for tests to look at."""


class PrunedLlava(Pruned):
    """Before a LLaVA-shaped model: a CLIP or SigLIP tower and a projector."""

    vision_tower: Any

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.hosts = Hosts(self.config)
        check_engine(vllm_config, self.hosts)
        #: the tower was built beyond the layer that the model reads
        self.whole = False
        if self.hosts.own is not None:
            self._whole_tower(vllm_config, prefix, self.hosts.own)
        self.tower_hooks = TowerHooks(self.vision_tower)
        self.at_once = images_at_once(vllm_config, self.hosts)
        say(self.hosts)

    def _whole_tower(self, vllm_config: Any, prefix: str, host: PlanHost) -> None:
        """vLLM builds the tower up to the layer that the model reads; some methods look at a later
        one, and then all of it is built."""
        stages = host.plan.encoder
        built = len(self.vision_tower.vision_model.encoder.layers)
        seen = max((number for stage in stages for number in stage.taps), default=-1)
        if seen < built and all(stage.after_tower is None for stage in stages):
            return
        self.whole = True
        with self._mark_tower_model(vllm_config, "image"):
            self.vision_tower = type(self.vision_tower)(
                self.config.vision_config,
                quant_config=vllm_config.quant_config,
                require_post_norm=False,
                prefix=f"{prefix}.vision_tower" if prefix else "vision_tower",
            )

    # ------------------------------------------------------------------ by model

    def layouts(self, given: Mapping[str, Any]) -> list[ImageLayout]:
        """Of all images of a call, how the model packs them."""
        side = self.config.vision_config.image_size
        return [self.hosts.layout(side, side)] * len(given["pixel_values"])

    def tiles(self, given: Mapping[str, Any], number: int, layout: ImageLayout) -> Tensor:
        """Pixels of an image's tiles [tiles, 3, H, W]."""
        return given["pixel_values"][number][None]  # type: ignore[no-any-return]

    def pack(self, rows: Tensor, layout: ImageLayout) -> Tensor:
        """The projector's output [tiles, F, D] of an image as the model packs it, [n, D]."""
        return rows.flatten(0, 1)

    @property
    def newline(self) -> Tensor | None:
        """The learned newline embedding [D]."""
        return None

    # ------------------------------------------------------------------ all images of a call

    def _process_image_input(self, image_input: Mapping[str, Any]) -> Any:
        given = image_input
        if given["type"] != "pixel_values":
            return super()._process_image_input(given)
        layouts = self.layouts(given)
        hosts = self.hosts_of(len(layouts))
        if all(host is None for host in hosts):
            return super()._process_image_input(given)
        found: dict[int, Tensor] = {}
        for numbers in batches(hosts, self.at_once):
            host = hosts[numbers[0]]
            assert host is not None
            own = [layouts[number] for number in numbers]
            pixels = torch.cat([self.tiles(given, i, layouts[i]) for i in numbers])
            found.update(zip(numbers, self._encode(host, own, pixels), strict=True))
        return [found[number] for number in range(len(layouts))]

    def _encode(self, host: PlanHost, layouts: list[ImageLayout], pixels: Tensor) -> list[Tensor]:
        """What is left of some images."""
        tower = host.start(layouts, pixels.device)
        if host.plan.encoder or self.whole:
            self.tower_hooks.install(host)
            rows = self.tower_hooks.run(tower, pixels, self.config.vision_feature_layer)
        else:
            rows = self._image_pixels_to_features(self.vision_tower, pixels)
        projected = self.multi_modal_projector(rows)
        packed: list[Tensor | None] = [None] * len(layouts)
        if not tower.reduced:
            parts = projected.split([layout.tiles for layout in layouts])
            packed = [self.pack(own, layout) for own, layout in zip(parts, layouts, strict=True)]
        left = self.unusable(host, layouts, projected.flatten(0, 1))
        if left is None:
            left = host.reduce(layouts, packed, tower, projected, self.newline)
        self.watch(left)
        return [own.features for own in left]


class PrunedTiles(PrunedLlava):
    """The same of a model that cuts images into tiles."""

    image_newline: Any

    def layouts(self, given: Mapping[str, Any]) -> list[ImageLayout]:
        sizes = torch.as_tensor(given["image_sizes"]).tolist()
        return [self.hosts.layout(int(height), int(width)) for height, width in sizes]

    def tiles(self, given: Mapping[str, Any], number: int, layout: ImageLayout) -> Tensor:
        # tiles of padding may stand behind an image's own
        return given["pixel_values"][number][: layout.tiles]  # type: ignore[no-any-return]

    @property
    def newline(self) -> Tensor | None:
        return self.image_newline  # type: ignore[no-any-return]


def batches(hosts: Sequence[PlanHost | None], most: int) -> list[list[int]]:
    """Numbers of images of the same plan, at most ``most`` at a time."""
    alike: dict[int, list[int]] = {}
    for number, host in enumerate(hosts):
        alike.setdefault(id(host), []).append(number)
    return [own[i : i + most] for own in alike.values() for i in range(0, len(own), most)]
