"""How images and prompts get into a model: what stands before the language-model input.

An entry tells the session two things about every prefill: where the images stand in the prompt
(``state.layout``), and what the vision encoder left of them (``state.records``).
"""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from tokprune.engine.cache import cache_in, check_cache, seen
from tokprune.engine.checkpointing import without_checkpoints
from tokprune.engine.compiling import with_step
from tokprune.engine.contracts import TowerInput
from tokprune.engine.copies import refuse_replica
from tokprune.engine.encoder import TowerPass
from tokprune.engine.finite import blame
from tokprune.engine.generations import Generations
from tokprune.engine.images import Encoding, attach, attached
from tokprune.engine.model import Tiles
from tokprune.engine.observed import ObservedPass
from tokprune.engine.packed import PackedPass
from tokprune.engine.pieces import Piece, features_of, joined_records
from tokprune.engine.prompt_layout import (
    PromptLayout,
    layout_from_mask,
    read_islands,
    read_layout,
)
from tokprune.engine.shared_encoder import ENCODERS, Encoded, share_keys, shared_encoder
from tokprune.engine.static_cache import is_static, padding_in, take_over
from tokprune.engine.traced_step import nothing_to_do
from tokprune.errors import PromptMismatchError, UnsupportedModelError, UnsupportedVideoError

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
        #: names of attributes that :meth:`install` put on modules
        self.wrapped: dict[nn.Module, tuple[str, ...]] = {self.parts.multimodal: ENCODERS}

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

    def leave(self, module: nn.Module, args: Any, *_: Any) -> None:
        """After a forward of the whole model, however it ended."""
        self.session.new_state()

    def tower_pass(
        self, layouts: list[ImageLayout], pixels: Tensor, first: int = 0, images: int = 0
    ) -> TowerPass:
        """A pass of the vision encoder over the tiles of these images, the first of which has the
        number ``first`` among the ``images`` of the call (0: these)."""
        tower, facts = self.parts.tower, self.session.facts.tower
        assert tower is not None
        assert facts is not None
        tile_images = tuple(i for i, lay in enumerate(layouts) for _ in range(lay.tiles))
        device = next(tower.module.parameters()).device
        if device.type == "meta":  # offloaded by accelerate: computed where the pixels are
            device = pixels.device
        given = TowerInput(
            facts,
            tile_images,
            device,
            tile_grids=tuple(layout.tile_grid for layout in layouts),
            sizes=tuple(layout.size for layout in layouts),
            videos=tuple(layout.video for layout in layouts),
            first_image=first,
            call_images=images,
        )
        plan = self.session.plan
        return TowerPass(plan.encoder, given, self.session.contracts, plan.rectify)

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
        state.attention_mask = mask
        if layout is not None:
            if all(not row for row in layout.columns):
                state.layout = None
                return
            self.check_mask(mask)
            check_cache(cache)


class TransformersEntry(Entry):
    """Models of transformers ≥ 4.57: ``get_image_features`` and, where the model takes videos,
    ``get_video_features``, then a forward whose ``input_ids`` hold one placeholder per token."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        forward = inspect.signature(type(self.parts.multimodal).forward)
        #: names of the multimodal forward's positional arguments
        self.arguments = list(forward.parameters)[1:]
        #: by which passes of the encoder are shared
        self.keys = share_keys(session.plan.encoder)
        pixels = (self.family.pixels, self.family.video_pixels)
        prunes_cache = any(stage.has_cache_policy for stage in session.plan.decoder)
        self.generation = Generations(
            session.model,
            (*pixels, "mm_encoder_outputs"),
            session.trace.method if prunes_cache else None,
        )
        self.wrapped[session.model] = ("generate",)

    def install(self) -> list[Any]:
        self._wrap("get_image_features", self._image_features)
        if self.parts.video_token_id is not None:
            self._wrap("get_video_features", self._video_features)
        self.generation.install()
        multimodal, idle = self.parts.multimodal, nothing_to_do(self.arguments)
        return [
            multimodal.register_forward_pre_hook(with_step(self._enter, idle), with_kwargs=True),
            multimodal.register_forward_hook(
                with_step(self.leave, idle), with_kwargs=True, always_call=True
            ),
        ]

    def remove(self) -> None:
        own = self.parts.multimodal.__dict__
        for name in ENCODERS:
            own.pop(name, None)
        if (shared := shared_encoder(self.parts.multimodal)) is not None:
            own.update(shared.unpatched)
        self.generation.remove()

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
        images = name == "get_image_features"
        pixels = self.family.pixels if images else self.family.video_pixels

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            call = signature.bind(*args, **kwargs).arguments
            # transformers 4 calls pixels of videos pixel_values here
            given = {**call.pop("kwargs", {}), **call, pixels: call[first]}

            def encode(changes: Mapping[str, Any] | None = None) -> Any:
                if changes is None:
                    return original(*args, **kwargs)
                own = {**given, **changes}
                own[first] = own.pop(pixels)
                return original(**own)

            return features(call[first], given, encode)

        self.parts.multimodal.__dict__[name] = wrapper

    def _image_features(self, pixels: Tensor, call: dict[str, Any], encode: Any) -> Any:
        state = self.session.state
        if state.in_videos:
            return encode()
        images = self._images_of(pixels, call)
        self._check_choices(call)
        try:
            result, encoding = self._encode(pixels, images, call, encode)
        finally:
            state.pixels = None
        layouts = images if isinstance(images, list) else state.image_layouts
        if layouts is not None:
            state.image_records = encoding.records(layouts)
        attach(result, encoding)
        return result

    def _video_features(self, pixels: Tensor, call: dict[str, Any], encode: Any) -> Any:
        state = self.session.state
        videos = self.family.videos(self.parts, self.session.facts, call)
        self._check_videos(videos)
        self._check_choices(call)
        state.in_videos = True
        try:
            result, encoding = self._encode(pixels, videos, call, encode)
        finally:
            state.in_videos = False
        state.video_records = self._parts_of(encoding, videos)
        attach(result, encoding)
        return result

    def _parts_of(self, encoding: Encoding, videos: list[ImageLayout]) -> list[list[ImageRecord]]:
        """The parts of every video that are compressed as one."""
        unit = self.session.plan.video_unit
        return [record.split(unit) for record in encoding.records(videos)]

    def _encode(
        self, pixels: Tensor, images: list[ImageLayout] | Tiles, call: dict[str, Any], encode: Any
    ) -> tuple[Any, Encoding]:
        """What ``encode`` returns, run or remembered, and what is known of these images."""
        shared = shared_encoder(self.parts.multimodal)
        if shared is None and (pieces := self._pieces(images, call)):
            return self._encode_pieces(images, pieces, pixels, encode)
        known = None if shared is None else shared.get(pixels, self.keys)
        tower = self._start(images, pixels)
        if known is None:
            result, projected = self._run(tower, pixels, encode)
            if shared is not None:
                outcomes = [] if tower is None else tower.outcomes
                shared.put(pixels, self.keys, Encoded(result, projected, outcomes))
        else:
            self._end()
            result, projected = known.result, known.projected
            if tower is not None:
                tower.outcomes = known.outcomes
        records = functools.partial(
            self.session.image_records, tower=tower, projected=projected, device=pixels.device
        )
        features = getattr(result, "pooler_output", result)
        if isinstance(images, list):
            records = functools.partial(_same, records(images))
        return result, Encoding(images, len(features), records)

    def _start(
        self, images: list[ImageLayout] | Tiles, pixels: Tensor, first: int = 0,
        whole: list[ImageLayout] | Tiles | None = None,
    ) -> TowerPass | ObservedPass | None:  # fmt: skip
        """The pass that the next run of the encoder makes; ``images`` may be a piece of ``whole``,
        from number ``first`` on."""
        state, number = self.session.state, 0
        if isinstance(images, list) and isinstance(whole, list):
            number = len(whole)
        if self.parts.tower is not None and isinstance(images, list):
            state.tower = self.tower_pass(images, pixels, first, number)
        elif self.parts.observed is not None and self.session.plan.encoder:
            part_of = whole[first] if number and isinstance(whole, list) else None
            frames = part_of.tiles if part_of is not None and part_of.video else 0
            state.observed = self._observed_pass(images, pixels, frames)
        return state.tower or state.observed

    def _end(self) -> None:
        state = self.session.state
        state.tower = state.observed = state.projected = None

    def _run(
        self, tower: TowerPass | ObservedPass | None, pixels: Tensor, encode: Callable[[], Any]
    ) -> tuple[Any, Tensor | None]:
        """What ``encode`` returns, and the projector's output."""
        try:
            with without_checkpoints(self._reduced_blocks()):
                result = encode()
            if tower is not None:
                tower.finish()
            projected = self.session.state.projected
            if projected is None and isinstance(tower, TowerPass):
                raise UnsupportedModelError(
                    f"the projector that {type(self.session.model).__name__} had when it was "
                    "patched did not run: another module (an adapter?) has taken its place; "
                    "patch the model again"
                )
            return result, projected
        except Exception as error:
            blame(error, pixels, None if tower is None else tower.seen)
            raise
        finally:
            self._end()

    def _pieces(self, images: list[ImageLayout] | Tiles, call: dict[str, Any]) -> list[Piece]:
        """The pieces that the encoder runs one after the other; none where it runs as a whole.

        Raises:
            UnsupportedVideoError: a stage has to see all frames of a video at once.
        """
        most, video = self.session.encode_at_once, self.session.state.in_videos
        if most is None or call.get("return_dict") is False:
            return []
        pieces = self.family.pieces(call, images, most, video)
        across = [stage.across for stage in self.session.plan.encoder]
        if any(piece.continues for piece in pieces) and "image" in across:
            raise UnsupportedVideoError(
                f"{self.session.trace.method} compares the frames of a video inside the vision "
                f"encoder, and encode_at_once={most} shows it so many at a time; leave it out, or "
                "make it as large as the video has frames"
            )
        return pieces if len(pieces) > 1 else []

    def _encode_pieces(
        self, images: list[ImageLayout] | Tiles, pieces: list[Piece], pixels: Tensor, encode: Any
    ) -> tuple[Any, Encoding]:
        """The same piece by piece."""
        session, video = self.session, self.session.state.in_videos
        name = self.family.video_pixels if video else self.family.pixels
        results, found, outcomes = [], [], []
        for piece in pieces:
            own = piece.changes[name]
            tower = self._start(piece.images, own, piece.first, images)
            result, projected = self._run(tower, own, functools.partial(encode, piece.changes))
            results.append(features_of(result))
            if isinstance(piece.images, list):
                found.append(session.image_records(piece.images, tower, projected, own.device))
            elif tower is not None:
                outcomes.append(tower.outcomes)
            del result, tower, projected  # hidden states of this piece, while the next one runs
        result = self.family.joined(results, pieces, video)
        features = getattr(result, "pooler_output", result)
        if isinstance(images, list):
            records = functools.partial(_same, joined_records(images, pieces, found))
        else:
            whole = self._observed_pass(images, pixels) if outcomes else None
            if whole is not None:  # stage by stage, as of one run
                whole.outcomes = [own for stage in zip(*outcomes) for own in stage]
            records = functools.partial(
                session.image_records, tower=whole, projected=None, device=pixels.device
            )
        return result, Encoding(images, len(features), records)

    def _reduced_blocks(self) -> Sequence[Any]:
        """Blocks of the encoder in which stages of the plan change what is computed."""
        if not any(stage.reduces or stage.alters for stage in self.session.plan.encoder):
            return ()
        tower, observed = self.parts.tower, self.parts.observed
        if tower is not None:
            return tower.layers  # type: ignore[no-any-return]
        return () if observed is None else observed.blocks

    def _observed_pass(
        self, images: list[ImageLayout] | Tiles, pixels: Tensor, frames: int = 0
    ) -> ObservedPass:
        """A pass of an encoder that stages only look at; ``frames``: of the video that it sees a
        part of."""
        session, observed = self.session, self.parts.observed
        facts = session.facts.observed
        assert observed is not None
        assert facts is not None
        layouts: list[ImageLayout] | None
        if isinstance(images, Tiles):
            layouts = None if images.count is None else [images.image(1)] * images.count
        else:
            layouts = images
        packs = any(stage.reduces or stage.packs for stage in session.plan.encoder)
        kind = PackedPass if packs else ObservedPass
        return kind(
            session.plan.encoder,
            facts,
            observed,
            layouts,
            pixels.device,
            session.contracts,
            frames,
            session.plan.rectify,
        )

    def _images_of(self, pixels: Tensor, call: dict[str, Any]) -> list[ImageLayout] | Tiles:
        """The images of a call, once for the forward and the encoder call inside it."""
        known = self.session.state.pixels
        if known is None or known[0] is not pixels:
            found = self.family.images(self.parts, self.session.facts, call)
            known = self.session.state.pixels = (pixels, found)
        return known[1]

    def _check_videos(self, layouts: list[ImageLayout]) -> None:
        """Before the tower runs: no stage takes from it what the model needs next.

        Raises:
            UnsupportedVideoError: a stage drops or merges rows of frames that the model pools.
        """
        plan, facts = self.session.plan, self.session.facts
        if facts.axes > 1 and "compact" in self.session.renumbers:
            raise UnsupportedVideoError(
                f"{self.session.trace.method}: positions='compact' is not defined for videos of "
                f"{facts.family}, whose positions tell the time; use positions='preserve' (the "
                "default on this model)"
            )
        pooled = next((x.token_grid for x in layouts if x.token_grid is not None), None)
        reduces = any(stage.reduces_videos for stage in plan.encoder)
        if pooled is None or facts.tower is None or not reduces:
            return
        name = type(self.session.model).__name__
        (h, w), (a, b) = facts.tower.grid, pooled.grids[0]
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

    def _enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        refuse_replica(module)
        self.session.new_state()
        call = {**dict(zip(self.arguments, args)), **kwargs}
        cache, mask = cache_in(call), call.get("attention_mask")
        ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
        tokens = 0 if (given := embeds if ids is None else ids) is None else given.shape[1]
        if static := is_static(cache):
            # for a step it is enough that there is any: what an ordinary layer holds is read from
            # the device
            past = 1 if tokens == 1 and cache.is_initialized else seen(cache)
            mask = padding_in(mask, past + tokens)
        else:
            past = seen(cache)
        if ids is None and embeds is not None:
            videos = " (or pixel_values_videos)" if self.session.facts.videos else ""
            layout = self.layout_of_embeds(
                embeds, mask, past, f"input_ids and pixel_values{videos}"
            )
        else:
            layout = self._read_layout(call, mask, past)
            if layout is not None:
                layout.guesses = self.generation.guesses(past + tokens)
        self.admit(layout, mask, cache)
        if static and self.session.state.layout is not None:
            # the prompt goes through as on a cache that grows, whose masks the model makes itself
            take_over(cache, [block.window for block in self.parts.decoder_layers], past + tokens)
            return (), {**call, "attention_mask": mask}
        return None

    def _read_layout(
        self, call: dict[str, Any], mask: Tensor | None, past: int
    ) -> PromptLayout | None:
        """Where the images and videos of a call stand in its prompts; None without any."""
        images, times = self._given(call, "image")
        videos, copies = self._given(call, "video")
        if images is None and videos is None:
            return None
        ids = call["input_ids"]
        if mask is not None and (mask.dim() != 2 or mask.shape[1] != past + ids.shape[1]):
            self.check_mask(mask)
            raise PromptMismatchError(
                f"attention_mask has {mask.shape[1]} columns; it should have {past + ids.shape[1]} "
                f"({past} cached and {ids.shape[1]} new tokens)"
            )
        visual, state = self.family.placeholders(self.parts, call), self.session.state
        times = max(times, copies)
        if isinstance(images, Tiles):
            layout, tiles = read_islands(visual, mask, past, images, times)
            state.image_layouts = [images.image(n) for n in tiles]
            encoding = self._encoding(call, "image")
            if encoding is not None:
                state.image_records = encoding[0].records(state.image_layouts)
            return layout
        stills, clips = images or [], videos or []
        unit = self.session.plan.video_unit
        parts = [[len(part.packed) for part in clip.parts(unit)] for clip in clips]
        layout = read_layout(
            visual, mask, past, [len(x.packed) for x in stills], [sum(p) for p in parts], times,
            (any(x.broken for x in stills), any(x.broken for x in clips)),
        )  # fmt: skip
        return layout.split([*([len(x.packed)] for x in stills), *parts])

    def _given(self, call: dict[str, Any], kind: Literal["image", "video"]) -> tuple[Any, int]:
        """The images (or tiles) or videos of a call, None without any; and how many copies of each
        prompt share them."""
        name = self.family.pixels if kind == "image" else self.family.video_pixels
        pixels, state = call.get(name), self.session.state
        if pixels is not None and pixels.shape[0] > 0:
            if kind == "image":
                return self._images_of(pixels, call), 1
            return self.family.videos(self.parts, self.session.facts, call), 1
        known = self._encoding(call, kind)
        if known is None:
            return None, 1
        encoding, times = known
        if isinstance(encoding.images, list):
            if kind == "image":
                state.image_records = encoding.records(encoding.images)
            else:
                state.video_records = self._parts_of(encoding, encoding.images)
        return encoding.images, times

    def _encoding(self, call: dict[str, Any], kind: str) -> tuple[Encoding, int] | None:
        """What is known of images or videos that were encoded ahead of the forward."""
        output = (call.get("mm_encoder_outputs") or {}).get(kind)
        if output is None:
            return None
        known = attached(output)
        if known is None:
            name = self.family.pixels if kind == "image" else self.family.video_pixels
            raise ValueError(
                "mm_encoder_outputs was computed before the model was patched (or without it); "
                f"pass {name}, or call get_{kind}_features on the patched model"
            )
        return known


def _same(records: list[ImageRecord], layouts: list[ImageLayout]) -> list[ImageRecord]:
    return records
