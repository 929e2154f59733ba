"""The family interface: where an architecture keeps its parts, and how it packs its images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokprune.engine.model import Block, Deep, ImageLayout, ModelFacts, Parts, Tiles
from tokprune.engine.pieces import Piece, joined
from tokprune.engine.tap import Call, TapFunction, capture, install_tap
from tokprune.engine.widths import ModelShape

if TYPE_CHECKING:
    from tokprune.engine.entry import Entry
    from tokprune.engine.session import Session


class Family(ABC):
    """Differences between model architectures; one instance per architecture, stateless."""

    #: short name, also used by method presets
    name: str
    #: class names of the transformers models this family covers
    model_classes: tuple[str, ...]
    #: names of the arguments that pixels are passed by
    pixels: str = "pixel_values"
    video_pixels: str = "pixel_values_videos"
    #: attention modules as in transformers 4.36/4.37: rotary tables of their own, masks of full
    #: shape [B, 1, queries, keys]
    legacy: bool = False
    #: flash attention would take its image tokens for text, silently in some releases
    drops_blocks_under_flash: bool = False
    #: whose classes these are, as :func:`tokprune.load` is told
    package: str = "transformers"
    #: model classes beside these that cannot be patched, and why
    refused: Mapping[str, str] = {}

    def unavailable(self) -> str | None:
        """Why its models cannot be patched with the packages that are installed; None: they can."""
        return None

    def of(self, model: nn.Module) -> Family:
        """The family of this very model, where a class covers several."""
        return self

    @abstractmethod
    def parts(self, model: nn.Module) -> Parts: ...

    @abstractmethod
    def images(
        self, parts: Parts, facts: ModelFacts, call: Mapping[str, Any]
    ) -> list[ImageLayout] | Tiles:
        """One layout per image of a call; host work only.

        Args:
            call: named arguments of the forward, or of ``get_image_features`` (``generate`` of
                transformers 5 encodes images ahead of the forward).
        """

    def videos(self, parts: Parts, facts: ModelFacts, call: Mapping[str, Any]) -> list[ImageLayout]:
        """One layout per video of a call, as for :meth:`images`."""
        raise NotImplementedError

    def pieces(
        self, call: Mapping[str, Any], images: list[ImageLayout] | Tiles, most: int, video: bool
    ) -> list[Piece]:
        """A call of the encoder in pieces of at most ``most`` images, tiles or frames, in order.
        Host work only. A family without this method cannot encode in pieces.

        Args:
            call: named arguments of ``get_image_features`` or, for a ``video``,
                ``get_video_features``.
            images: what :meth:`images` or :meth:`videos` says of it.
        """
        raise NotImplementedError

    @property
    def has_pieces(self) -> bool:
        """Whether its encoder can run in pieces."""
        return type(self).pieces is not Family.pieces

    def joined(self, results: Sequence[Any], pieces: Sequence[Piece], video: bool) -> Any:
        """What the encoder's method would have returned for the whole call (of an output: its
        features alone), from what it returned for all pieces."""
        return joined(results, pieces)

    def placeholders(self, parts: Parts, call: Mapping[str, Any]) -> Tensor:
        """[B, L] long: 1 where ``input_ids`` stand for images, 2 for videos, 0 for text."""
        ids = call["input_ids"]
        visual: Tensor = (ids == parts.image_token_id).long()
        if parts.video_token_id is not None:
            visual = visual + 2 * (ids == parts.video_token_id)
        return visual

    def deep(self, kwargs: dict[str, Any], first_drop: int) -> list[Deep]:
        """Features that the model adds between its decoder layers, taken out of the language
        model's arguments where a drop before layer ``first_drop`` would have it add them to other
        tokens."""
        return []

    def entry(self, session: Session) -> Entry:
        """How images and prompts get into a model of this family."""
        from tokprune.engine.entry import TransformersEntry

        return TransformersEntry(session)

    def tap(self, module: Any, function: TapFunction, wanted: Callable[[], bool]) -> Any:
        """Tap an attention module (:func:`tokprune.engine.tap.install_tap`)."""
        return install_tap(module, function, wanted)

    def attention_ahead(self, block: Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """The attention call of a decoder layer that has not run, on these arguments."""
        with torch.no_grad():  # scores need no gradient
            return capture(block.attention, lambda: block.module.forward(*args, **kwargs))

    def newline(self, parts: Parts) -> Tensor | None:
        """The learned newline embedding, where the family has one."""
        return None

    @abstractmethod
    def facts(self, model: nn.Module, parts: Parts) -> ModelFacts: ...

    def bind(self, model: nn.Module) -> BoundModel:
        """A model of this family with all that is known of it.

        Raises:
            UnsupportedModelError: it lacks something that the engine needs.
        """
        parts = self.parts(model)
        return BoundModel(model, self, parts, self.facts(model, parts), ModelShape.of(model, parts))


@dataclass(frozen=True)
class BoundModel:
    """A model, its family, the modules that are hooked, its facts and its widths; made once, by
    :func:`tokprune.families.bind`."""

    model: Any
    family: Family
    parts: Parts
    facts: ModelFacts
    shape: ModelShape
