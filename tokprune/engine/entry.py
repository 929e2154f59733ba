"""How pictures and prompts get into a model: what stands before the language model's door.

An entry tells the session two things about every prefill: where the images stand in the prompt
(``now.layout``), and what the vision encoder left of them (``now.records``).
"""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tokprune.engine.cache import cache_in, check_cache
from tokprune.engine.encoder import TowerPass
from tokprune.engine.images import attach, attached
from tokprune.engine.layout import PromptLayout, layout_from_mask, read_layout
from tokprune.engine.shared import Encoded, share_keys, shared_encoder
from tokprune.engine.stages import TowerInput
from tokprune.errors import PromptMismatchError

if TYPE_CHECKING:
    from tokprune.engine.session import Session
    from tokprune.families.base import ImageLayout

_visual_positions: ContextVar[Tensor | None] = ContextVar("visual_positions", default=None)


@contextmanager
def visual_positions(mask: Tensor) -> Iterator[None]:
    """Name the visual tokens of calls that pass ``inputs_embeds`` instead of ``input_ids``.

    Args:
        mask: [B, L] bool, True at image tokens; every run of True is one image.
    """
    token = _visual_positions.set(mask)
    try:
        yield
    finally:
        _visual_positions.reset(token)


class Entry(ABC):
    """The way into one patched model; installed and removed with its session."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.parts, self.family = session.parts, session.family

    @abstractmethod
    def install(self) -> list[Any]:
        """Put hooks and wrappers in; returns the handles of the hooks."""

    @abstractmethod
    def remove(self) -> None:
        """Take out what :meth:`install` put in besides hooks."""

    @abstractmethod
    def door(self, kwargs: dict[str, Any]) -> None:
        """Before a call of the language model: last occasion to know its prompt."""

    # ------------------------------------------------------------------ for all entries

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """After a forward of the whole model, however it ended."""
        self.session.now.clear()

    def tower_pass(self, layouts: list[ImageLayout], pixels: Tensor) -> TowerPass:
        """A pass of the vision encoder over the tiles of these images."""
        tile_images = tuple(i for i, lay in enumerate(layouts) for _ in range(lay.tiles))
        device = next(self.parts.tower.parameters()).device
        if device.type == "meta":  # offloaded by accelerate: computed where the pixels are
            device = pixels.device
        grids = tuple(layout.tile_grid for layout in layouts)
        tower = TowerInput(self.session.facts, tile_images, device, grids)
        return TowerPass(self.session.plan.encoder, tower)

    @staticmethod
    def check_mask(mask: Tensor | None) -> None:
        if mask is not None and mask.dim() != 2:
            raise ValueError(
                f"attention_mask with {mask.dim()} dimensions is not supported; it should be "
                "[batch, tokens] (1 = real token)"
            )

    def layout_of_embeds(
        self, embeds: Tensor, mask: Tensor | None, past: int, instead: str
    ) -> PromptLayout | None:
        """Layout of a prompt that came as embeddings; ``instead``: what to pass to have it known.

        Raises:
            ValueError: the method needs the images, or nobody said where they are.
        """
        if embeds.shape[1] == 1 and past:
            return None
        plan = self.session.plan
        if plan.prompt or any(s.reduces for s in plan.encoder):
            raise ValueError(
                "inputs_embeds: this method works before the decoder, where the images must be "
                f"known; pass {instead} instead"
            )
        visual = _visual_positions.get()
        if visual is None:
            raise ValueError(
                f"inputs_embeds does not say which tokens are visual; pass {instead}, or call "
                "inside tokprune.visual_positions(mask)"
            )
        if tuple(visual.shape) != tuple(embeds.shape[:2]):
            raise ValueError(
                f"visual_positions mask has shape {tuple(visual.shape)}; it should be "
                f"{tuple(embeds.shape[:2])} like inputs_embeds"
            )
        return layout_from_mask(visual, mask, past)

    def admit(self, layout: PromptLayout | None, mask: Tensor | None, cache: Any) -> None:
        """Take a prompt with images as the one of this forward (text-only prompts pass by)."""
        now = self.session.now
        now.layout = layout
        if layout is not None:
            if all(not row for row in layout.columns):
                now.layout = None
                return
            self.check_mask(mask)
            check_cache(cache)


class TransformersEntry(Entry):
    """LLaVA-shaped models of transformers ≥ 4.57: ``get_image_features``, then a forward whose
    ``input_ids`` hold one placeholder per image token."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        forward = inspect.signature(type(self.parts.multimodal).forward)
        #: names of the multimodal forward's positional arguments
        self.arguments = list(forward.parameters)[1:]

    def install(self) -> list[Any]:
        self._wrap_image_features()
        multimodal = self.parts.multimodal
        return [
            multimodal.register_forward_pre_hook(self._enter, with_kwargs=True),
            multimodal.register_forward_hook(self.leave, always_call=True),
        ]

    def remove(self) -> None:
        self.parts.multimodal.__dict__.pop("get_image_features", None)
        if (shared := shared_encoder(self.parts.multimodal)) is not None:
            self.parts.multimodal.__dict__["get_image_features"] = shared.unpatched

    def door(self, kwargs: dict[str, Any]) -> None:
        pass  # the forward around it has said everything

    def _wrap_image_features(self) -> None:
        """``get_image_features`` is a method, no module, so no hook reaches it; generate() calls
        it ahead of the forward. An attribute of this one instance stands before it."""
        shared = shared_encoder(self.parts.multimodal)
        keys = share_keys(self.session.plan.encoder)
        original = self.parts.multimodal.get_image_features if shared is None else shared.original
        signature = inspect.signature(original)

        @functools.wraps(original)
        def get_image_features(*args: Any, **kwargs: Any) -> Any:
            call = signature.bind(*args, **kwargs).arguments
            layouts = self._layouts(call["pixel_values"], call.get("image_sizes"))
            self._check_feature_choice(call)
            now = self.session.now
            now.tower = self.tower_pass(layouts, call["pixel_values"])
            known = None if shared is None else shared.get(call["pixel_values"], keys)
            try:
                if known is None:
                    result = original(*args, **kwargs)
                    now.tower.finish()
                    if shared is not None and now.projected is not None:
                        encoded = Encoded(result, now.projected, now.tower.outcomes)
                        shared.put(call["pixel_values"], keys, encoded)
                else:
                    result, now.projected = known.result, known.projected
                    now.tower.outcomes = known.outcomes
                records = self.session.image_records(layouts)
            finally:
                now.tower = now.projected = now.layouts = None
            features = getattr(result, "pooler_output", result)
            for tensor, record in zip(features, records):
                attach(tensor, record)
            now.records = records
            return result

        self.parts.multimodal.__dict__["get_image_features"] = get_image_features

    def _layouts(self, pixels: Tensor, image_sizes: Any) -> list[ImageLayout]:
        """Layouts of the images, once for the forward and the encoder call inside it."""
        known = self.session.now.layouts
        if known is None or known[0] is not pixels:
            layouts = self.family.layouts(self.parts, pixels, image_sizes, self.session.facts)
            known = self.session.now.layouts = (pixels, layouts)
        return known[1]

    def _check_feature_choice(self, call: dict[str, Any]) -> None:
        config: Any = self.session.model.config
        for name in ("vision_feature_layer", "vision_feature_select_strategy"):
            value = call.get(name)
            if value is not None and value != getattr(config, name):
                raise ValueError(
                    f"{name}={value!r} differs from the model's config "
                    f"({getattr(config, name)!r}); change the config before patching"
                )

    def _enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        now = self.session.now
        now.clear()
        call = {**dict(zip(self.arguments, args)), **kwargs}
        cache = cache_in(call)
        pixels, ids = call.get("pixel_values"), call.get("input_ids")
        encoded = (call.get("mm_encoder_outputs") or {}).get("image")
        past = cache.get_seq_length() if cache is not None else 0
        mask = call.get("attention_mask")
        layout = None
        if ids is None and call.get("inputs_embeds") is not None:
            layout = self.layout_of_embeds(
                call["inputs_embeds"], mask, past, "input_ids and pixel_values"
            )
        elif pixels is not None and pixels.shape[0] > 0:
            layouts = self._layouts(pixels, call.get("image_sizes"))
            layout = self._read_layout(ids, mask, past, [len(x.packed) for x in layouts])
        elif encoded is not None:
            records = [attached(f) for f in getattr(encoded, "pooler_output", encoded)]
            if any(r is None for r in records):
                raise ValueError(
                    "mm_encoder_outputs was computed before the model was patched (or without "
                    "it); pass pixel_values, or call get_image_features on the patched model"
                )
            now.records = records  # type: ignore[assignment]
            layout = self._read_layout(ids, mask, past, [r.count for r in records if r])
        self.admit(layout, mask, cache)

    def _read_layout(
        self, ids: Any, mask: Tensor | None, past: int, counts: list[int]
    ) -> PromptLayout:
        if mask is not None and (mask.dim() != 2 or mask.shape[1] != past + ids.shape[1]):
            self.check_mask(mask)
            raise PromptMismatchError(
                f"attention_mask has {mask.shape[1]} columns; it should have {past + ids.shape[1]} "
                f"({past} cached and {ids.shape[1]} new tokens)"
            )
        return read_layout(ids == self.parts.image_token_id, mask, past, counts)
