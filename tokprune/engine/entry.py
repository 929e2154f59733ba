"""How images and prompts get into a model: what stands before the language-model input.

An entry tells the session two things about every prefill: where the images stand in the prompt
(``state.layout``), and what the vision encoder left of them (``state.records``).
"""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tokprune.engine.cache import cache_in, check_cache
from tokprune.engine.contracts import TowerInput
from tokprune.engine.encoder import TowerPass
from tokprune.engine.images import attach, attached
from tokprune.engine.prompt_layout import PromptLayout, layout_from_mask, read_layout
from tokprune.engine.shared_encoder import ENCODERS, Encoded, share_keys, shared_encoder
from tokprune.errors import PromptMismatchError, UnsupportedVideoError

if TYPE_CHECKING:
    from tokprune.engine.images import ImageRecord
    from tokprune.engine.model import ImageLayout
    from tokprune.engine.session import Session

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
    def language_model_input(self, kwargs: dict[str, Any]) -> None:
        """Before a call of the language model: last occasion to know its prompt."""

    # ------------------------------------------------------------------ for all entries

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """After a forward of the whole model, however it ended."""
        self.session.new_state()

    def tower_pass(self, layouts: list[ImageLayout], pixels: Tensor) -> TowerPass:
        """A pass of the vision encoder over the tiles of these images."""
        tile_images = tuple(i for i, lay in enumerate(layouts) for _ in range(lay.tiles))
        device = next(self.parts.tower.parameters()).device
        if device.type == "meta":  # offloaded by accelerate: computed where the pixels are
            device = pixels.device
        tower = TowerInput(
            self.session.facts,
            tile_images,
            device,
            tile_grids=tuple(layout.tile_grid for layout in layouts),
            sizes=tuple(layout.size for layout in layouts),
            videos=tuple(layout.video for layout in layouts),
        )
        return TowerPass(self.session.plan.encoder, tower, self.session.contracts)

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
        state = self.session.state
        state.layout = layout
        if layout is not None:
            if all(not row for row in layout.columns):
                state.layout = None
                return
            self.check_mask(mask)
            check_cache(cache)


class TransformersEntry(Entry):
    """LLaVA-shaped models of transformers ≥ 4.57: ``get_image_features`` and, where the model takes
    videos, ``get_video_features``, then a forward whose ``input_ids`` hold one placeholder per
    token."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        forward = inspect.signature(type(self.parts.multimodal).forward)
        #: names of the multimodal forward's positional arguments
        self.arguments = list(forward.parameters)[1:]
        #: by which passes of the encoder are shared
        self.keys = share_keys(session.plan.encoder)

    def install(self) -> list[Any]:
        self._wrap("get_image_features", self._image_features)
        if self.parts.video_token_id is not None:
            self._wrap("get_video_features", self._video_features)
        multimodal = self.parts.multimodal
        return [
            multimodal.register_forward_pre_hook(self._enter, with_kwargs=True),
            multimodal.register_forward_hook(self.leave, always_call=True),
        ]

    def remove(self) -> None:
        own = self.parts.multimodal.__dict__
        for name in ENCODERS:
            own.pop(name, None)
        if (shared := shared_encoder(self.parts.multimodal)) is not None:
            own.update(shared.unpatched)

    def language_model_input(self, kwargs: dict[str, Any]) -> None:
        pass  # the forward around it has said everything

    # ------------------------------------------------------------------ the encoder

    def _wrap(self, name: str, features: Callable[..., Any]) -> None:
        """``get_image_features`` and ``get_video_features`` are methods, no modules, so no hook
        reaches them; generate() calls them ahead of the forward. An attribute of this one instance
        stands before each."""
        shared = shared_encoder(self.parts.multimodal)
        original = getattr(self.parts.multimodal, name) if shared is None else shared.original[name]
        signature = inspect.signature(original)
        first = next(iter(signature.parameters))

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            call = signature.bind(*args, **kwargs).arguments
            return features(call[first], call, functools.partial(original, *args, **kwargs))

        self.parts.multimodal.__dict__[name] = wrapper

    def _image_features(self, pixels: Tensor, call: dict[str, Any], encode: Any) -> Any:
        state, layouts = self.session.state, self._layouts(pixels, call)
        self._check_choices(call)
        try:
            result, state.image_records = self._encode(pixels, layouts, encode)
        finally:
            state.layouts = None
        for tensor, record in zip(getattr(result, "pooler_output", result), state.image_records):
            attach(tensor, record)
        return result

    def _video_features(self, pixels: Tensor, call: dict[str, Any], encode: Any) -> Any:
        """The records of all videos travel with the output, one tensor in most releases."""
        state, layouts = self.session.state, self._video_layouts(pixels)
        self._check_videos(layouts)
        self._check_choices(call)
        result, records = self._encode(pixels, layouts, encode)
        state.video_records = [record.split(self.session.plan.video_unit) for record in records]
        if not isinstance(result, tuple | list | Tensor):
            attach(result, state.video_records)
        return result

    def _encode(
        self, pixels: Tensor, layouts: list[ImageLayout], encode: Callable[[], Any]
    ) -> tuple[Any, list[ImageRecord]]:
        """What ``encode`` returns, run or remembered, and the records of these images."""
        shared, state = shared_encoder(self.parts.multimodal), self.session.state
        state.tower = self.tower_pass(layouts, pixels)
        known = None if shared is None else shared.get(pixels, self.keys)
        try:
            if known is None:
                result = encode()
                state.tower.finish()
                if shared is not None and state.projected is not None:
                    shared.put(
                        pixels, self.keys, Encoded(result, state.projected, state.tower.outcomes)
                    )
            else:
                result, state.projected = known.result, known.projected
                state.tower.outcomes = known.outcomes
            return result, self.session.image_records(layouts)
        finally:
            state.tower = state.projected = None

    def _layouts(self, pixels: Tensor, call: dict[str, Any]) -> list[ImageLayout]:
        """Layouts of the images, once for the forward and the encoder call inside it."""
        known = self.session.state.layouts
        if known is None or known[0] is not pixels:
            layouts = self.family.layouts(
                self.parts, pixels, call.get("image_sizes"), self.session.facts,
                call.get("batch_num_images"),
            )  # fmt: skip
            known = self.session.state.layouts = (pixels, layouts)
        return known[1]

    def _video_layouts(self, pixels: Tensor) -> list[ImageLayout]:
        if pixels.dim() != 5:
            raise ValueError(
                f"pixel_values_videos has {pixels.dim()} dimensions; it should be [videos, frames, "
                "channels, height, width]"
            )
        return self.family.video_layouts(self.parts, pixels, self.session.facts)

    def _check_videos(self, layouts: list[ImageLayout]) -> None:
        """Before the tower runs: no stage takes from it what the model needs next.

        Raises:
            UnsupportedVideoError: a stage drops or merges rows of frames that the model pools.
        """
        plan, facts = self.session.plan, self.session.facts
        pooled = next((x.token_grid for x in layouts if x.token_grid is not None), None)
        if pooled is None or not any(stage.reduces_videos for stage in plan.encoder):
            return
        name = type(self.session.model).__name__
        (h, w), (a, b) = facts.grid, pooled.grids[0]
        raise UnsupportedVideoError(
            f"{self.session.trace.method} drops or merges tokens inside the vision tower, and "
            f"{name} pools the whole {h}×{w} grid of every frame of a video to {a}×{b} after it; "
            "for videos use a method that works at the language-model input or in the decoder "
            "(divprune, cdpruner, centerclip, evs, dart, fastv, mustdrop with spatial=False, …); "
            "on images this one works"
        )

    def _check_choices(self, call: dict[str, Any]) -> None:
        config: Any = self.session.model.config
        for name in ("vision_feature_layer", "vision_feature_select_strategy",
                     "vision_aspect_ratio"):  # fmt: skip
            value = call.get(name)
            if value is not None and value != getattr(config, name, value):
                raise ValueError(
                    f"{name}={value!r} differs from the model's config "
                    f"({getattr(config, name)!r}); change the config before patching"
                )

    # ------------------------------------------------------------------ the forward

    def _enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.session.new_state()
        call = {**dict(zip(self.arguments, args)), **kwargs}
        cache = cache_in(call)
        past = cache.get_seq_length() if cache is not None else 0
        mask = call.get("attention_mask")
        layout = None
        if call.get("input_ids") is None and call.get("inputs_embeds") is not None:
            videos = " (or pixel_values_videos)" if self.session.facts.videos else ""
            layout = self.layout_of_embeds(
                call["inputs_embeds"], mask, past, f"input_ids and pixel_values{videos}"
            )
        else:
            images, (videos_, times) = self._images(call), self._videos(call)
            if images is not None or videos_ is not None:
                layout = self._read_layout(call, mask, past, images or [], videos_ or [], times)
        self.admit(layout, mask, cache)

    def _images(self, call: dict[str, Any]) -> list[int] | None:
        """Prompt tokens of every image of a call; None without any."""
        pixels = call.get("pixel_values")
        encoded = (call.get("mm_encoder_outputs") or {}).get("image")
        if pixels is not None and pixels.shape[0] > 0:
            return [len(x.packed) for x in self._layouts(pixels, call)]
        if encoded is None:
            return None
        records = [attached(f) for f in getattr(encoded, "pooler_output", encoded)]
        if any(r is None for r in records):
            raise ValueError(_encoded_before("image"))
        self.session.state.image_records = records
        return [r.count for r in records]

    def _videos(self, call: dict[str, Any]) -> tuple[list[list[int]] | None, int]:
        """Prompt tokens of the parts of every video of a call, None without any; and how many
        copies of each prompt share the videos."""
        pixels = call.get("pixel_values_videos")
        encoded = (call.get("mm_encoder_outputs") or {}).get("video")
        video_unit = self.session.plan.video_unit
        if pixels is not None and pixels.shape[0] > 0:
            layouts = self._video_layouts(pixels)
            return [[len(part.packed) for part in x.parts(video_unit)] for x in layouts], 1
        if encoded is None:
            return None, 1
        records = attached(encoded)
        if records is None:
            raise ValueError(_encoded_before("video"))
        self.session.state.video_records = records
        counts = [[part.count for part in video] for video in records]
        return counts, len(encoded.pooler_output) // max(1, len(records))

    def _read_layout(
        self,
        call: dict[str, Any],
        mask: Tensor | None,
        past: int,
        images: list[int],
        videos: list[list[int]],
        times: int,
    ) -> PromptLayout:
        ids = call["input_ids"]
        if mask is not None and (mask.dim() != 2 or mask.shape[1] != past + ids.shape[1]):
            self.check_mask(mask)
            raise PromptMismatchError(
                f"attention_mask has {mask.shape[1]} columns; it should have {past + ids.shape[1]} "
                f"({past} cached and {ids.shape[1]} new tokens)"
            )
        visual = ids == self.parts.image_token_id
        if self.parts.video_token_id is not None:
            visual = visual.long() + 2 * (ids == self.parts.video_token_id)
        layout = read_layout(visual, mask, past, images, [sum(v) for v in videos], times)
        return layout.split([*([n] for n in images), *videos])


def _encoded_before(kind: str) -> str:
    pixels = "pixel_values" if kind == "image" else "pixel_values_videos"
    return (
        "mm_encoder_outputs was computed before the model was patched (or without it); pass "
        f"{pixels}, or call get_{kind}_features on the patched model"
    )
