"""One patched model: installs the hooks of a plan, drives each forward, takes the hooks out."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache

from tokprune.engine.cache import CompressedLayer, cache_argument, cache_in, check_cache
from tokprune.engine.decoder import LayerCalls, PrefillPass, StepPass
from tokprune.engine.encoder import EncoderHooks, TowerPass
from tokprune.engine.images import ImageRecord, attach, attached, build_records
from tokprune.engine.layout import PromptLayout, layout_from_mask, read_layout
from tokprune.engine.masks import backend_of, check_backend
from tokprune.engine.prompt import native_view, shorten_prompt
from tokprune.engine.shared import Encoded, share_keys, shared_encoder
from tokprune.engine.stages import ImageTokens, ModelFacts, Plan, Selection, TowerInput
from tokprune.engine.tap import Tap, install_tap
from tokprune.errors import NonFiniteFeaturesError, PromptMismatchError
from tokprune.families import family_of
from tokprune.families.base import ImageLayout
from tokprune.trace import Trace

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


class _Forward(threading.local):
    """What is going on in this thread."""

    tower: TowerPass | None = None
    projected: Tensor | None = None
    layouts: tuple[Tensor, list[ImageLayout]] | None = None
    layout: PromptLayout | None = None
    records: list[ImageRecord] | None = None
    prefill: PrefillPass | None = None
    step: StepPass | None = None
    finite: Tensor | None = None
    images: Any = None

    def clear(self) -> None:
        self.tower = self.projected = self.layout = self.records = None
        self.prefill = self.step = self.finite = self.images = self.layouts = None


class Session:
    """A method at work on a model, from :meth:`install` to :meth:`remove`."""

    def __init__(self, model: nn.Module, plan: Plan, trace: Trace) -> None:
        self.model, self.plan, self.trace = model, plan, trace
        self.family = family_of(model)
        self.parts = self.family.parts(model)
        self.facts: ModelFacts = self.family.facts(model, self.parts)
        self.handles: list[RemovableHandle | Tap] = []
        self.now = _Forward()
        forward = inspect.signature(type(self.parts.multimodal).forward)
        #: names of the multimodal forward's positional arguments
        self.arguments = list(forward.parameters)[1:]
        #: made by compress(), not by patch()
        self.nested = False
        self.backend = check_backend(backend_of(self.parts.language_model), "language model")
        reducing = [stage for stage in plan.encoder if stage.reduces]
        positions = [s.positions for s in reducing] + [s.positions for s in plan.prompt]
        self.compact = all(p == "compact" for p in positions)
        self.spatial = all(stage.order == "spatial" for stage in reducing)

    # ------------------------------------------------------------------ install, remove

    def install(self) -> None:
        parts, plan = self.parts, self.plan
        try:
            self._wrap_image_features()
            multimodal, decoder = parts.multimodal, parts.language_model
            self.handles += [
                multimodal.register_forward_pre_hook(self._enter, with_kwargs=True),
                multimodal.register_forward_hook(self._leave, always_call=True),
                parts.projector.register_forward_pre_hook(self._reduced_features),
                parts.projector.register_forward_hook(self._projector),
                decoder.register_forward_pre_hook(self._door, with_kwargs=True),
                decoder.register_forward_hook(self._decoded),
            ]
            encoder = EncoderHooks(parts.encoder_layers, plan.encoder, lambda: self.now.tower)
            self.handles += encoder.install()
            for number, layer in enumerate(parts.decoder_layers):
                self._install_decoder_layer(number, layer)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.parts.multimodal.__dict__.pop("get_image_features", None)
        if (shared := shared_encoder(self.parts.multimodal)) is not None:
            self.parts.multimodal.__dict__["get_image_features"] = shared.unpatched
        self.now.clear()

    def _install_decoder_layer(self, number: int, layer: Any) -> None:
        stages = self.plan.decoder
        self.handles.append(
            layer.register_forward_pre_hook(self._before_layer(number), with_kwargs=True)
        )
        if any(number in stage.taps for stage in stages):
            self.handles.append(
                install_tap(
                    layer.self_attn, self._tap(number), lambda: self.now.prefill is not None
                )
            )
        if any(number in stage.transition_layers for stage in stages):
            self.handles += self._transition_hooks(number, layer)

    # ------------------------------------------------------------------ vision

    def _wrap_image_features(self) -> None:
        """``get_image_features`` is a method, no module, so no hook reaches it; generate() calls
        it ahead of the forward. An attribute of this one instance stands before it."""
        shared = shared_encoder(self.parts.multimodal)
        keys = share_keys(self.plan.encoder)
        original = self.parts.multimodal.get_image_features if shared is None else shared.original
        signature = inspect.signature(original)

        @functools.wraps(original)
        def get_image_features(*args: Any, **kwargs: Any) -> Any:
            call = signature.bind(*args, **kwargs).arguments
            layouts = self._layouts(call["pixel_values"], call.get("image_sizes"))
            self._check_feature_choice(call)
            tile_images = tuple(i for i, lay in enumerate(layouts) for _ in range(lay.tiles))
            device = next(self.parts.tower.parameters()).device
            if device.type == "meta":  # offloaded by accelerate: computed where the pixels are
                device = call["pixel_values"].device
            now = self.now
            grids = tuple(layout.tile_grid for layout in layouts)
            tower = TowerInput(self.facts, tile_images, device, grids)
            now.tower = TowerPass(self.plan.encoder, tower)
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
                records = self._records(layouts, now.tower, now.projected)
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
        known = self.now.layouts
        if known is None or known[0] is not pixels:
            layouts = self.family.layouts(self.parts, pixels, image_sizes, self.facts)
            known = self.now.layouts = (pixels, layouts)
        return known[1]

    def _records(
        self, layouts: list[ImageLayout], tower: TowerPass, projected: Tensor | None
    ) -> list[ImageRecord]:
        assert projected is not None
        want_raw = any(stage.wants_raw for stage in self.plan.prompt)
        newline = self.family.newline(self.parts)
        return build_records(layouts, self.facts, tower, projected, newline, self.spatial, want_raw)

    def _check_feature_choice(self, call: dict[str, Any]) -> None:
        config: Any = self.model.config
        for name in ("vision_feature_layer", "vision_feature_select_strategy"):
            value = call.get(name)
            if value is not None and value != getattr(config, name):
                raise ValueError(
                    f"{name}={value!r} differs from the model's config "
                    f"({getattr(config, name)!r}); change the config before patching"
                )

    def _reduced_features(self, module: nn.Module, args: Any) -> Any:
        """transformers 4.57 records the hidden states of SigLIP towers inside the blocks' forward,
        before any hook: what a stage did at the feature layer itself would be lost."""
        tower = self.now.tower
        if tower is None or tower.features is None:
            return None
        cut = tower.tokens.first_patch - int(self.facts.cls_in_features)
        return tower.features[:, cut:].to(args[0].device), *args[1:]

    def _projector(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        tower = self.now.tower
        if tower is None:
            return None
        self.now.projected = output
        if not tower.reduced:
            return None
        # The model packs full grids next: give it one, with the survivors in their slots.
        tokens, facts = tower.tokens, self.facts
        cut = tokens.first_patch - int(facts.cls_in_features)
        slots = tokens.slots[:, cut:].to(output.device) + int(facts.cls_in_features)
        spare = facts.tokens_per_tile
        if cut:
            slots = torch.where(slots < 0, spare, slots)
        elif tokens.valid is not None:
            slots = torch.where(tokens.valid.to(output.device), slots, spare)
        full = output.new_zeros(output.shape[0], spare + 1, output.shape[2])
        index = slots[:, :, None].expand(-1, -1, output.shape[2])
        return full.scatter(1, index, output)[:, :spare]

    # ------------------------------------------------------------------ forward

    def _enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        now = self.now
        now.clear()
        call = {**dict(zip(self.arguments, args)), **kwargs}
        cache = cache_in(call)
        pixels, ids = call.get("pixel_values"), call.get("input_ids")
        encoded = (call.get("mm_encoder_outputs") or {}).get("image")
        past = cache.get_seq_length() if cache is not None else 0
        mask = call.get("attention_mask")
        if ids is None and call.get("inputs_embeds") is not None:
            now.layout = self._layout_of_embeds(call, mask, past)
        elif pixels is not None and pixels.shape[0] > 0:
            layouts = self._layouts(pixels, call.get("image_sizes"))
            now.layout = self._read_layout(ids, mask, past, [len(x.packed) for x in layouts])
        elif encoded is not None:
            records = [attached(f) for f in getattr(encoded, "pooler_output", encoded)]
            if any(r is None for r in records):
                raise ValueError(
                    "mm_encoder_outputs was computed before the model was patched (or without "
                    "it); pass pixel_values, or call get_image_features on the patched model"
                )
            now.records = records  # type: ignore[assignment]
            now.layout = self._read_layout(ids, mask, past, [r.count for r in records if r])
        if now.layout is not None:
            if all(not row for row in now.layout.columns):
                now.layout = None
                return
            self._check_mask(mask)
            check_cache(cache)

    def _read_layout(
        self, ids: Any, mask: Tensor | None, past: int, counts: list[int]
    ) -> PromptLayout:
        if mask is not None and (mask.dim() != 2 or mask.shape[1] != past + ids.shape[1]):
            self._check_mask(mask)
            raise PromptMismatchError(
                f"attention_mask has {mask.shape[1]} columns; it should have {past + ids.shape[1]} "
                f"({past} cached and {ids.shape[1]} new tokens)"
            )
        return read_layout(ids == self.parts.image_token_id, mask, past, counts)

    @staticmethod
    def _check_mask(mask: Tensor | None) -> None:
        if mask is not None and mask.dim() != 2:
            raise ValueError(
                f"attention_mask with {mask.dim()} dimensions is not supported; it should be "
                "[batch, tokens] (1 = real token)"
            )

    def _layout_of_embeds(
        self, call: dict[str, Any], mask: Tensor | None, past: int
    ) -> PromptLayout | None:
        embeds = call["inputs_embeds"]
        if embeds.shape[1] == 1 and past:
            return None
        if self.plan.prompt or any(s.reduces for s in self.plan.encoder):
            raise ValueError(
                "inputs_embeds: this method works before the decoder, where the images must be "
                "known; pass input_ids and pixel_values instead"
            )
        visual = _visual_positions.get()
        if visual is None:
            raise ValueError(
                "inputs_embeds does not say which tokens are visual; pass input_ids and "
                "pixel_values, or call inside tokprune.visual_positions(mask)"
            )
        if tuple(visual.shape) != tuple(embeds.shape[:2]):
            raise ValueError(
                f"visual_positions mask has shape {tuple(visual.shape)}; it should be "
                f"{tuple(embeds.shape[:2])} like inputs_embeds"
            )
        return layout_from_mask(visual, mask, past)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.now.clear()

    def _calls(self) -> LayerCalls:
        window = getattr(self.parts.language_model.config, "sliding_window", None)
        if not getattr(self.parts.language_model.config, "use_sliding_window", True):
            window = None
        return LayerCalls(self.parts.rotary, self.backend, window)

    def _door(self, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Before the language model: shorten the prompt, or prepare a step on a short cache."""
        now, cache = self.now, cache_in(kwargs)
        mask = kwargs.get("attention_mask")
        if now.layout is None:
            if cache is not None and any(isinstance(x, CompressedLayer) for x in cache.layers):
                self._check_mask(mask)
                now.step = StepPass(self._calls(), cache, mask)
            return None
        embeds = kwargs["inputs_embeds"]
        past = cache.get_seq_length() if cache is not None else 0
        if cache is None and _uses_cache(module, kwargs):
            cache = DynamicCache(config=module.config)
            kwargs.pop("past_key_values", None)  # may be there as None
            kwargs[cache_argument(module)] = cache
        position_ids = kwargs.get("position_ids")
        if position_ids is None:
            position_ids = torch.arange(past, past + embeds.shape[1], device=embeds.device)[None]
        native = native_view(now.layout, position_ids, embeds.device)
        now.finite = torch.isfinite(embeds).all()
        view = native
        images: list[ImageTokens] = []
        answers: list[Selection | None] = []
        if now.records is not None:
            embeds, view, images, answers = shorten_prompt(
                embeds, now.layout, now.records, self.plan.prompt, native, self.compact
            )
        now.images = (images, answers)
        prefill = PrefillPass(self._calls(), self.plan.decoder, view, native, cache, past, mask)
        now.prefill = prefill
        if view is native:
            return None
        kwargs["inputs_embeds"], kwargs["position_ids"] = embeds, view.position
        if past or (prefill.calls.window is not None and not self.compact):
            prefill.detached = True  # the model's own masks would count other tokens
        if view.padded or past:
            real = view.valid.to(torch.long)
            before = real.new_ones(real.shape[0], past) if mask is None else mask[:, :past]
            kwargs["attention_mask"] = torch.cat([before.to(real.dtype), real], dim=1)
        elif cache is not None:
            kwargs["attention_mask"] = None  # nothing to mask, and no look at the values
        else:
            # without cache and mask, gaps in the positions would be taken for packed sequences
            kwargs["attention_mask"] = view.valid.to(torch.long)
        if kwargs.get("cache_position") is not None:  # up to transformers 5.3
            kwargs["cache_position"] = torch.arange(
                past, past + embeds.shape[1], device=embeds.device
            )
        return args, kwargs

    def _before_layer(self, number: int) -> Any:
        def hook(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            now = self.now
            active = now.prefill or now.step
            if active is None:
                return None
            hidden = args[0] if args else kwargs["hidden_states"]
            new = active.prepare(number, layer, hidden, kwargs)
            if args:
                return (new, *args[1:]), kwargs
            kwargs["hidden_states"] = new
            return args, kwargs

        return hook

    def _tap(self, number: int) -> Any:
        def tap(
            module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float
        ) -> None:
            if self.now.prefill is not None:
                self.now.prefill.attention(number, q, k, v, scale)

        return tap

    def _transition_hooks(self, number: int, layer: Any) -> list[RemovableHandle]:
        def before(name: str) -> Any:
            def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
                if self.now.prefill is not None:
                    given = args[0] if args else kwargs["hidden_states"]
                    self.now.prefill.module_input = given

            return hook

        def after(name: Any) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                prefill = self.now.prefill
                if prefill is None or prefill.module_input is None:
                    return
                out = output[0] if isinstance(output, tuple) else output
                given, prefill.module_input = prefill.module_input, None
                for stage, run in zip(prefill.stages, prefill.runs):
                    if number in stage.transition_layers:
                        run.transition(number, name, given, out, prefill.view)

            return hook

        handles: list[RemovableHandle] = []
        for name, module in (("attention", layer.self_attn), ("mlp", layer.mlp)):
            handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
            handles.append(module.register_forward_hook(after(name)))
        return handles

    def _decoded(self, module: nn.Module, args: Any, output: Any) -> None:
        """After the language model: prune caches, check features, write the trace."""
        now = self.now
        if now.step is not None:
            self.trace.record_step()
        if now.prefill is None:
            return
        if now.finite is not None:
            _check_finite(now.finite)
        now.prefill.finish()
        self.trace.record_prefill(self, now.prefill, now.layout, now.records, now.images)


def _check_finite(finite: Tensor) -> None:
    """Raise for NaN or infinite features; read at the end of the prefill, where the caller is
    about to look at the logits anyway."""
    if not bool(finite):
        raise NonFiniteFeaturesError(
            "the embedded prompt (pixel_values through vision tower and projector, or "
            "inputs_embeds) holds NaN or infinite values; no ranking of tokens means anything "
            "there. Check pixel_values, and the dtype (float16 may overflow: try bfloat16)"
        )


def _uses_cache(module: Any, kwargs: dict[str, Any]) -> bool:
    use = kwargs.get("use_cache")
    return bool(module.config.use_cache if use is None else use)
