"""One patched model: installs the hooks of a plan, drives each forward, takes the hooks out."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokprune.engine.cache import CompressedLayer, cache_argument, cache_in
from tokprune.engine.compat import new_cache
from tokprune.engine.contracts import ImageTokens, Plan, Selection
from tokprune.engine.decoder import LayerCalls, PrefillPass, StepPass
from tokprune.engine.encoder import EncoderHooks, TowerPass
from tokprune.engine.entry import Entry, visual_positions
from tokprune.engine.family import BoundModel
from tokprune.engine.images import ImageRecord, build_records
from tokprune.engine.masks import backend_of, check_backend
from tokprune.engine.model import ImageLayout
from tokprune.engine.prompt_layout import PromptLayout
from tokprune.engine.recorder import PrefillRecord, Recorder
from tokprune.engine.shorten import native_sequence, shorten_prompt
from tokprune.errors import NonFiniteFeaturesError

__all__ = ["Session", "visual_positions"]


class _Forward(threading.local):
    """What is going on in this thread."""

    tower: TowerPass | None = None
    projected: Tensor | None = None
    layouts: tuple[Tensor, list[ImageLayout]] | None = None
    layout: PromptLayout | None = None
    image_records: list[ImageRecord] | None = None
    #: the parts of every video that are compressed as one
    video_records: list[list[ImageRecord]] | None = None
    prefill: PrefillPass | None = None
    step: StepPass | None = None
    finite: Tensor | None = None
    images: Any = None

    @property
    def records(self) -> list[ImageRecord] | None:
        """Images, then parts of videos, as the prompt's layout numbers them."""
        if self.image_records is None and self.video_records is None:
            return None
        parts = [part for video in self.video_records or [] for part in video]
        return [*(self.image_records or []), *parts]

    def clear(self) -> None:
        self.tower = self.projected = self.layout = None
        self.image_records = self.video_records = None
        self.prefill = self.step = self.finite = self.images = self.layouts = None


class Session:
    """A method at work on a model, from :meth:`install` to :meth:`remove`."""

    def __init__(self, bound: BoundModel, plan: Plan, trace: Recorder) -> None:
        self.bound, self.plan = bound, plan
        #: whoever keeps the record; the api knows its class
        self.trace: Any = trace
        self.model, self.family = bound.model, bound.family
        self.parts, self.facts = bound.parts, bound.facts
        self.handles: list[Any] = []
        self.now = _Forward()
        #: made by compress(), not by patch()
        self.nested = False
        self.backend = check_backend(backend_of(self.parts.language_model), "language model")
        reducing = [stage for stage in plan.encoder if stage.reduces]
        positions = [s.positions for s in reducing] + [s.positions for s in plan.prompt]
        self.compact = all(p == "compact" for p in positions)
        self.spatial = all(stage.order == "spatial" for stage in reducing)
        self.entry: Entry = self.family.entry(self)

    # ------------------------------------------------------------------ install, remove

    def install(self) -> None:
        parts, plan = self.parts, self.plan
        try:
            self.handles += self.entry.install()
            decoder = parts.language_model
            self.handles += [
                parts.projector.register_forward_pre_hook(self._reduced_features),
                parts.projector.register_forward_hook(self._projector),
                decoder.register_forward_pre_hook(self._language_model_input, with_kwargs=True),
                decoder.register_forward_hook(self._decoded),
            ]
            encoder = EncoderHooks(
                parts.encoder_layers, plan.encoder, lambda: self.now.tower, self.family.tap,
                self.family.legacy,
            )  # fmt: skip
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
        self.entry.remove()
        self.now.clear()

    def _install_decoder_layer(self, number: int, layer: Any) -> None:
        stages = self.plan.decoder
        self.handles.append(
            layer.register_forward_pre_hook(self._before_layer(number), with_kwargs=True)
        )
        if any(number in stage.taps for stage in stages):
            self.handles.append(
                self.family.tap(
                    layer.self_attn, self._tap(number), lambda: self.now.prefill is not None
                )
            )
        if any(number in stage.transition_layers for stage in stages):
            self.handles += self._transition_hooks(number, layer)

    # ------------------------------------------------------------------ vision

    def image_records(self, layouts: list[ImageLayout]) -> list[ImageRecord]:
        """What the encoder pass that has just ended left of these images."""
        tower, projected = self.now.tower, self.now.projected
        assert tower is not None
        assert projected is not None
        want_raw = any(stage.wants_raw for stage in self.plan.prompt)
        newline = self.family.newline(self.parts)
        return build_records(layouts, self.facts, tower, projected, newline, self.spatial, want_raw)

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

    def _calls(self) -> LayerCalls:
        window = self.family.window(self.parts, self.backend)
        norm = self.parts.language_model.norm
        return LayerCalls(self.parts.rotary, self.backend, window, norm, self.family.legacy)

    def _language_model_input(self, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Before the language model: shorten the prompt, or prepare a step on a short cache."""
        self.entry.language_model_input(kwargs)
        now, cache = self.now, cache_in(kwargs)
        mask = kwargs.get("attention_mask")
        if now.layout is None:
            layers = getattr(cache, "layers", ())
            if any(isinstance(layer, CompressedLayer) for layer in layers):
                self.entry.check_mask(mask)
                now.step = StepPass(self._calls(), cache, mask)
            return None
        embeds = kwargs["inputs_embeds"]
        past = cache.get_seq_length() if cache is not None else 0
        if cache is None and _uses_cache(module, kwargs):
            cache = new_cache(module.config)
            kwargs.pop("past_key_values", None)  # may be there as None
            kwargs[cache_argument(module)] = cache
        position_ids = kwargs.get("position_ids")
        if position_ids is None:
            position_ids = torch.arange(past, past + embeds.shape[1], device=embeds.device)[None]
        native = native_sequence(now.layout, position_ids, embeds.device)
        now.finite = torch.isfinite(embeds).all()
        sequence = native
        images: list[ImageTokens] = []
        answers: list[Selection | None] = []
        if (records := now.records) is not None:
            embeds, sequence, images, answers = shorten_prompt(
                embeds, now.layout, records, self.plan.prompt, native, self.compact
            )
        now.images = (images, answers)
        prefill = PrefillPass(self._calls(), self.plan.decoder, sequence, native, cache, past, mask)
        now.prefill = prefill
        if sequence is native:
            return None
        kwargs["inputs_embeds"], kwargs["position_ids"] = embeds, sequence.position
        if past or (prefill.calls.window is not None and not self.compact):
            prefill.detached = True  # the model's own masks would count other tokens
        if sequence.padded or past:
            real = sequence.valid.to(torch.long)
            before = real.new_ones(real.shape[0], past) if mask is None else mask[:, :past]
            kwargs["attention_mask"] = torch.cat([before.to(real.dtype), real], dim=1)
        elif cache is not None:
            kwargs["attention_mask"] = None  # nothing to mask, and no look at the values
        else:
            # without cache and mask, gaps in the positions would be taken for packed sequences
            kwargs["attention_mask"] = sequence.valid.to(torch.long)
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
                        run.transition(number, name, given, out, prefill.sequence)

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
        assert now.layout is not None
        entered, selections = now.images
        self.trace.record_prefill(
            PrefillRecord(
                self.bound, self.plan, now.prefill, now.layout, now.records, entered, selections
            )
        )


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
