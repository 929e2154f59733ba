"""The plans that a server runs: that of its setting, and those of requests with a ``keep``."""

from __future__ import annotations

import functools
from typing import Any

import torch

from tokprune.engine.model import ImageLayout, Tiles
from tokprune.families.grids import image_of
from tokprune.integrations.vllm.host import PlanHost
from tokprune.integrations.vllm.setting import KEY, ServedSetting, with_keep
from tokprune.integrations.vllm.twin import twin_of
from tokprune.methods.options import Budget


class Hosts:
    """All of a model's config that matters here."""

    def __init__(self, config: Any) -> None:
        """
        Raises:
            ValueError: the config has no setting that can be used, or the method cannot work in
                vLLM, or on this model; says why.
        """
        self.setting = ServedSetting.of(config)
        self.bound = twin_of(config)
        self.own: PlanHost | None = None
        #: keeps the most that a request may ask for
        self.most: PlanHost | None = None
        self.of = functools.lru_cache(maxsize=64, typed=True)(self._of)  # 1 is not 1.0
        self.layout = functools.lru_cache(maxsize=4096)(self._layout)
        self.tiles = functools.lru_cache(maxsize=64)(self._tiles)
        method, most = self.setting.method, self.setting.max_keep
        if method is not None:
            self.own = self.most = PlanHost(method, self.bound)
            if most is not None:
                self.most = PlanHost(with_keep(method, most), self.bound)

    def _of(self, keep: Budget | None) -> PlanHost | None:
        """The plan of a request; None: nothing is reduced.

        Raises:
            ValueError: ``keep`` is none for this method and model.
        """
        if keep is None:
            return self.own
        if self.setting.method is None:
            raise ValueError(f"{KEY}: keep={keep!r}, and pruning is switched off in this server")
        return PlanHost(with_keep(self.setting.method, keep), self.bound)

    def _layout(self, height: int, width: int) -> ImageLayout:
        """How the model packs an image of so many pixels, where its size alone tells."""
        images = self._images(image_sizes=[[height, width]])
        return images[0] if isinstance(images, list) else images.image(1)

    def _tiles(self, number: int) -> ImageLayout:
        """An image of so many tiles, of a model that knows of its images the tiles alone."""
        images = self._images()
        assert isinstance(images, Tiles)
        return images.image(number)

    def _images(self, **more: Any) -> list[ImageLayout] | Tiles:
        """Of a call with one image, or tile."""
        bound = self.bound
        call = {bound.family.pixels: torch.empty(1, 0), **more}
        return bound.family.images(bound.parts, bound.facts, call)

    def examples(self) -> list[tuple[str, ImageLayout]]:
        """Images in words: the smallest and the largest that a model tells apart, or some one."""
        config: Any = self.bound.model.config
        if self.bound.facts.axes > 1:
            return [("24×24 tokens", image_of(24, 24))]
        if self.bound.facts.tower is None and isinstance(self._images(), Tiles):
            return [("1 tile", self.tiles(1)), ("5 tiles", self.tiles(5))]
        side = int(config.vision_config.image_size)
        sizes = [(side, side)]
        if places := getattr(config, "image_grid_pinpoints", None):
            largest = max(places, key=lambda size: size[0] * size[1])
            sizes.append((int(largest[0]), int(largest[1])))
        return [(f"{h}×{w} pixels", self.layout(h, w)) for h, w in sizes]

    def count(self, layout: ImageLayout, keep: Budget | None = None) -> int:
        """Tokens that are left of an image in a request.

        Raises:
            ValueError: ``keep`` is none for this method, or leaves more than the server has made
                room for.
        """
        host = self.of(keep)
        if host is None:
            return layout.count
        left = host.count(layout)
        assert self.most is not None
        if host is not self.own and left > (most := self.most.count(layout)):
            raise ValueError(
                f"{KEY}: keep={keep!r} leaves {left} tokens of this image, and the server was "
                f"started for at most {most}; raise max_keep in its setting"
            )
        return left


def keep_of(kwargs: Any) -> Budget | None:
    """The ``keep`` of a request's ``mm_processor_kwargs``, None where it has none.

    Raises:
        ValueError: something else stands there.
    """
    given = kwargs.get(KEY)
    if given is None:
        return None
    keep = given.get("keep") if isinstance(given, dict) else None
    if (
        keep is None
        or len(given) > 1
        or isinstance(keep, bool)
        or not isinstance(keep, int | float)
    ):
        raise ValueError(
            f"mm_processor_kwargs[{KEY!r}]={given!r} should be {{'keep': …}} with a number of "
            "tokens or a fraction, and nothing else"
        )
    return keep  # type: ignore[no-any-return]


def without_keep(kwargs: Any) -> dict[str, Any]:
    """``mm_processor_kwargs`` without what is ours."""
    return {name: value for name, value in kwargs.items() if name != KEY}


def encoded(keep: Budget | None) -> float:
    """A ``keep`` as one number, for a field of an image: counts above 0, fractions below it."""
    if keep is None:
        return 0.0
    return float(keep) if isinstance(keep, int) else -float(keep)


def decoded(value: float) -> Budget | None:
    """What :func:`encoded` was given."""
    if value == 0:
        return None
    return int(value) if value > 0 else -float(value)
