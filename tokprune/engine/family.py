"""The family interface: where an architecture keeps its parts, and how it packs its images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tokprune.engine.model import ImageLayout, ModelFacts, Parts
from tokprune.engine.tap import TapFunction, install_tap
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
    #: tiles and newline tokens (anyres)
    tiled: bool = False
    #: attention modules as in transformers 4.36/4.37: rotary tables of their own, masks of full
    #: shape [B, 1, queries, keys]
    legacy: bool = False
    #: whose classes these are, as :func:`tokprune.load` is told
    package: str = "transformers"
    #: model classes beside these that cannot be patched, and why
    refused: Mapping[str, str] = {}

    def unavailable(self) -> str | None:
        """Why its models cannot be patched with the packages that are installed; None: they can."""
        return None

    @abstractmethod
    def parts(self, model: nn.Module) -> Parts: ...

    @abstractmethod
    def layouts(
        self, parts: Parts, pixel_values: Tensor, image_sizes: Any, facts: ModelFacts,
        batch_num_images: Any = None,
    ) -> list[ImageLayout]:  # fmt: skip
        """One layout per image of ``pixel_values``; host work only. ``batch_num_images``: images
        of each prompt, for families that tile single images only."""

    def video_layouts(
        self, parts: Parts, pixel_values: Tensor, facts: ModelFacts
    ) -> list[ImageLayout]:
        """One layout per video of ``pixel_values`` [videos, frames, 3, H, W]; host work only."""
        raise NotImplementedError

    @abstractmethod
    def max_tiles(self, model: nn.Module) -> int: ...

    def entry(self, session: Session) -> Entry:
        """How images and prompts get into a model of this family."""
        from tokprune.engine.entry import TransformersEntry

        return TransformersEntry(session)

    def tap(self, module: Any, function: TapFunction, wanted: Callable[[], bool]) -> Any:
        """Tap an attention module (:func:`tokprune.engine.tap.install_tap`)."""
        return install_tap(module, function, wanted)

    def window(self, parts: Parts, backend: str) -> int | None:
        """Width of the decoder's sliding window in tokens, or None."""
        config = parts.language_model.config
        if not getattr(config, "use_sliding_window", True):
            return None
        return getattr(config, "sliding_window", None)

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
