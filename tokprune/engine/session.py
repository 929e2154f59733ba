"""One patched model: installs the hooks of a plan, drives each forward, takes the hooks out."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from tokprune.engine.cache import CompressedLayer, cache_argument, cache_in
from tokprune.engine.check import Contracts
from tokprune.engine.compat import new_cache
from tokprune.engine.contracts import Plan
from tokprune.engine.encoder import EncoderHooks
from tokprune.engine.entry import Entry, visual_positions
from tokprune.engine.family import BoundModel
from tokprune.engine.images import ImageRecord, build_records
from tokprune.engine.layer_calls import LayerCalls
from tokprune.engine.masks import backend_of, check_backend
from tokprune.engine.model import ImageLayout
from tokprune.engine.prefill import PrefillPass
from tokprune.engine.prefill_cache import PrefillCache
from tokprune.engine.recorder import PrefillRecord, Recorder
from tokprune.engine.shorten import native_sequence, shorten_prompt
from tokprune.engine.state import CurrentState, ForwardState
from tokprune.engine.step import StepPass
from tokprune.errors import NonFiniteFeaturesError

__all__ = ["Session", "visual_positions"]


class Session:
    """A method at work on a model, from :meth:`install` to :meth:`remove`."""

    def __init__(
        self, bound: BoundModel, plan: Plan, trace: Recorder, validate: bool | None = None
    ) -> None:
        self.bound, self.plan = bound, plan
        self.contracts = Contracts.of(trace.method, validate)
        #: whoever keeps the record; the api knows its class
        self.trace: Any = trace
        self.model, self.family = bound.model, bound.family
        self.parts, self.facts = bound.parts, bound.facts
        self.handles: list[Any] = []
        self._current = CurrentState()
        #: made by compress(), not by patch()
        self.nested = False
        self.backend = check_backend(backend_of(self.parts.language_model), "language model")
        reducing = [stage for stage in plan.encoder if stage.reduces]
        positions = [s.positions for s in reducing] + [s.positions for s in plan.prompt]
        self.compact = all(p == "compact" for p in positions)
        self.spatial = all(stage.order == "spatial" for stage in reducing)
        self.entry: Entry = self.family.entry(self)

    @property
    def state(self) -> ForwardState:
        """What is known of the forward that runs in this thread."""
        return self._current.state

    def new_state(self) -> ForwardState:
        """Forget what this thread's forward knew."""
        self._current.state = ForwardState()
        return self._current.state

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
                parts.encoder_layers, plan.encoder, lambda: self.state.tower, self.family.tap,
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
        self.new_state()

    def _install_decoder_layer(self, number: int, layer: Any) -> None:
        stages, attention = self.plan.decoder, layer.self_attn
        hooks = [layer.register_forward_pre_hook(self._before_layer(number), with_kwargs=True)]
        if any(number in stage.taps for stage in stages):
            hooks.append(self.family.tap(attention, self._tap(number), self._in_prefill))
        if any(number in stage.transition_layers for stage in stages):
            hooks += [
                attention.register_forward_hook(
                    self._transition(number, "attention"), with_kwargs=True
                ),
                layer.mlp.register_forward_hook(self._transition(number, "mlp"), with_kwargs=True),
            ]
        self.handles += hooks

    def _in_prefill(self) -> bool:
        return self.state.prefill is not None

    # ------------------------------------------------------------------ vision

    def image_records(self, layouts: list[ImageLayout]) -> list[ImageRecord]:
        """What the encoder pass that has just ended left of these images."""
        tower, projected = self.state.tower, self.state.projected
        assert tower is not None
        assert projected is not None
        want_raw = any(stage.wants_raw for stage in self.plan.prompt)
        newline = self.family.newline(self.parts)
        return build_records(layouts, self.facts, tower, projected, newline, self.spatial, want_raw)

    def _reduced_features(self, module: nn.Module, args: Any) -> Any:
        """transformers 4.57 records the hidden states of SigLIP towers inside the blocks' forward,
        before any hook: what a stage did at the feature layer itself would be lost."""
        tower = self.state.tower
        if tower is None or tower.features is None:
            return None
        return tower.features[:, tower.cut_rows :].to(args[0].device), *args[1:]

    def _projector(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        tower = self.state.tower
        if tower is None:
            return None
        self.state.projected = output
        return tower.full_grid(output) if tower.reduced else None

    # ------------------------------------------------------------------ forward

    def _calls(self) -> LayerCalls:
        window = self.family.window(self.parts, self.backend)
        norm = self.parts.language_model.norm
        return LayerCalls(self.parts.rotary, self.backend, window, norm, self.family.legacy)

    def _language_model_input(self, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Before the language model: shorten the prompt, or prepare a step on a short cache."""
        self.entry.language_model_input(kwargs)
        state, cache = self.state, cache_in(kwargs)
        mask = kwargs.get("attention_mask")
        if state.layout is None:
            layers = getattr(cache, "layers", ())
            if any(isinstance(layer, CompressedLayer) for layer in layers):
                self.entry.check_mask(mask)
                state.step = StepPass(self._calls(), cache, mask)
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
        native = native_sequence(state.layout, position_ids, embeds.device)
        state.finite = torch.isfinite(embeds).all()
        sequence = native
        if (records := state.records) is not None:
            embeds, sequence, state.entered, state.selections = shorten_prompt(
                embeds, state.layout, records, self.plan.prompt, native, self.compact,
                self.contracts,
            )  # fmt: skip
        calls = self._calls()
        state.prefill = prefill = PrefillPass(
            calls, self.plan.decoder, sequence, native,
            PrefillCache(cache, past, mask, native, calls.window), self.contracts,
        )  # fmt: skip
        if sequence is native:
            return None
        kwargs["inputs_embeds"], kwargs["position_ids"] = embeds, sequence.position
        if past or (calls.window is not None and not self.compact):
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
            active = self.state.active
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
            if (prefill := self.state.prefill) is not None:
                prefill.attention(number, q, k, v, scale)

        return tap

    def _transition(self, number: int, name: Literal["attention", "mlp"]) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            if (prefill := self.state.prefill) is not None:
                before = args[0] if args else kwargs["hidden_states"]
                after = output[0] if isinstance(output, tuple) else output
                prefill.transition(number, name, before, after)

        return hook

    def _decoded(self, module: nn.Module, args: Any, output: Any) -> None:
        """After the language model: prune caches, check features, write the trace."""
        state = self.state
        if state.step is not None:
            self.trace.record_step()
        if state.prefill is None:
            return
        if state.finite is not None:
            _check_finite(state.finite)
        state.prefill.finish()
        assert state.layout is not None
        self.trace.record_prefill(
            PrefillRecord(
                self.bound, self.plan, state.prefill, state.layout, state.records,
                state.entered or [], state.selections or [],
            )
        )  # fmt: skip


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
