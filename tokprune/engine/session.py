"""One patched model: installs the hooks of a plan, drives each forward, takes the hooks out."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tokprune.engine.cache import CompressedLayer, cache_in, seen
from tokprune.engine.check import Contracts
from tokprune.engine.checkpointing import LayerHooks
from tokprune.engine.compat import new_cache
from tokprune.engine.compiling import NAMES, Uncompiled, hand_over, traceable, with_step
from tokprune.engine.contracts import Plan
from tokprune.engine.copies import Guards, refuse_replica
from tokprune.engine.encoder import EncoderHooks, TowerPass
from tokprune.engine.entry import Entry, visual_positions
from tokprune.engine.family import BoundModel, Family
from tokprune.engine.finite import guarded, not_finite
from tokprune.engine.hooked import hooked
from tokprune.engine.images import ImageRecord, build_records
from tokprune.engine.labels import Alive, LossHooks
from tokprune.engine.layer_calls import LayerCalls
from tokprune.engine.masks import backend_of, check_backend
from tokprune.engine.model import Block, ImageLayout
from tokprune.engine.observed import ObservedPass, install_observers
from tokprune.engine.packed import install_packed
from tokprune.engine.positions import RotaryCall
from tokprune.engine.prefill import PrefillPass
from tokprune.engine.prefill_cache import PrefillCache
from tokprune.engine.prompt_layout import PromptLayout
from tokprune.engine.recorder import PrefillRecord, Recorder
from tokprune.engine.rectify import check_rectify
from tokprune.engine.shorten import native_sequence, select_visual
from tokprune.engine.state import CurrentState, ForwardState
from tokprune.engine.step import StepPass
from tokprune.engine.tap import Call
from tokprune.engine.traced_step import TracedStep
from tokprune.engine.widen import widen_arguments, widened
from tokprune.errors import UnsupportedModelError

__all__ = ["Session", "visual_positions"]


class Session:
    """A method at work on a model, from :meth:`install` to :meth:`remove`."""

    def __init__(
        self, bound: BoundModel, plan: Plan, trace: Recorder, validate: bool | None = None,
        encode_at_once: int | None = None,
    ) -> None:  # fmt: skip
        self.bound, self.plan = bound, plan
        #: images, tiles or frames that the vision encoder runs at a time; None: all
        self.encode_at_once = encode_at_once
        self.contracts = Contracts.of(trace.method, validate)
        #: whoever keeps the record; the api knows its class
        self.trace: Any = trace
        self.model, self.family = bound.model, bound.family
        self.parts, self.facts = bound.parts, bound.facts
        self.handles: list[Any] = []
        #: those of the decoder's layers
        self.layers: list[LayerHooks] = []
        self._uncompiled: Uncompiled | None = None
        self._current = CurrentState()
        #: made by compress(), not by patch()
        self.nested = False
        #: called with every deep copy of the model, which is bare
        self.copied: Callable[[nn.Module], object] | None = None
        self._guards: Guards | None = None
        self._check_backend()
        reducing = [stage for stage in plan.encoder if stage.reduces]
        positions = [s.positions for s in reducing] + [s.positions for s in plan.prompt]
        #: what the stages do with positions, as far as they say
        self.renumbers = {
            getattr(s, "positions", None) for s in (*reducing, *plan.prompt, *plan.decoder)
        }
        self.compact = all(p == "compact" for p in positions)
        self.spatial = all(stage.order == "spatial" for stage in reducing)
        self.step = TracedStep(self.parts.language_model)
        self.loss = LossHooks(self.model, lambda: self.alive, self.family.legacy)
        self.entry: Entry = self.family.entry(self)

    @property
    def state(self) -> ForwardState:
        """What is known of the forward that runs in this thread."""
        return self._current.state

    @property
    def alive(self) -> Alive | None:
        """What is left of the prompt of this thread's newest forward; None: all, in its place."""
        return self._current.alive

    def new_state(self) -> ForwardState:
        """Forget what this thread's forward knew."""
        for layer in self.layers:
            layer.leave()
        self._current.state = ForwardState()
        return self._current.state

    # ------------------------------------------------------------------ install, remove

    def install(self) -> None:
        parts, plan = self.parts, self.plan
        try:
            self.handles += self.entry.install() + self.loss.install()
            decoder = parts.language_model
            self.handles += [
                decoder.register_forward_pre_hook(
                    with_step(
                        self._guarded(self._language_model_input), self.step.language_model_input
                    ),
                    with_kwargs=True,
                ),
                decoder.register_forward_hook(with_step(self._decoded, self.step.decoded)),
            ]
            if (tower := parts.tower) is not None:
                self.handles += [
                    tower.projector.register_forward_pre_hook(traceable(self._reduced_features)),
                    tower.projector.register_forward_hook(traceable(self._projector)),
                ]
                encoder = EncoderHooks(
                    tower.layers, plan.encoder, lambda: self.state.tower, self.family.tap,
                    self.family.legacy, tower.embeddings,
                )  # fmt: skip
                self.handles += encoder.install()
            if parts.observed is not None:
                self.handles += install_observers(
                    parts.observed, plan.encoder, lambda: self.state.observed, self.family.tap
                )
                if any(stage.reduces or stage.packs for stage in plan.encoder):
                    self.handles += install_packed(parts.observed, lambda: self.state.observed)
            for module in parts.rotary:
                self.handles.append(
                    module.register_forward_hook(
                        traceable(self._rotary, self.step.rotary), with_kwargs=True
                    )
                )
            for number, block in enumerate(parts.decoder_layers):
                self._install_decoder_layer(number, block)
            hooks = hooked(self.model, self.handles)
            for module in self._blocks_of_tower():
                hooks.setdefault(module, set())
            self._uncompiled = Uncompiled(hooks)
            names: dict[nn.Module, tuple[str, ...]] = dict.fromkeys(hooks, NAMES)
            for module, own in self.entry.wrapped.items():
                names[module] = (*names.get(module, ()), *own)
            self._guards = Guards(self.model, hooks, names, self.copied)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        self.new_state()
        if self._uncompiled is not None:
            self._uncompiled.release()
            self._uncompiled = None
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.layers.clear()
        self.entry.remove()
        if self._guards is not None:
            self._guards.release()
            self._guards = None

    def _install_decoder_layer(self, number: int, block: Block) -> None:
        stages = self.plan.decoder
        deep = type(self.family).deep is not Family.deep
        own = LayerHooks(
            block.module, self._before_layer(number, block),
            self._after_layer(number) if deep else None,
            (self.step.before_layer(number, block.window), self.step.inside_layer),
        )  # fmt: skip
        self.layers.append(own)
        hooks = own.install()
        tapped = any(number in stage.taps for stage in stages)
        if self.plan.rectify is not None and block.has_attention:
            hooks.append(self.family.tap(block.attention, self._rectified, self._rectifies))
        if tapped or any(number in stage.ahead for stage in stages):
            function = self._tap(number)
            wanted = self._in_prefill if tapped else _never
            hooks.append(self.family.tap(block.attention, function, wanted))
        if any(number in stage.transition_layers for stage in stages):
            kinds: tuple[tuple[Literal["attention", "mlp"], Any, Any], ...] = (
                ("attention", block.attention, block.attention_out),
                ("mlp", block.mlp, block.mlp_out),
            )
            for name, module, out in kinds:
                before, after = (
                    traceable(hook, self.step.inside_layer)
                    for hook in self._transition(number, name)
                )
                hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
                hooks.append(out.register_forward_hook(after))
        self.handles += hooks

    def _blocks_of_tower(self) -> list[nn.Module]:
        """Those of a tower that stages work in, hooks or not: all have code of their own where
        ``torch.compile`` cannot follow the loop over them."""
        tower, observed = self.parts.tower, self.parts.observed
        if not self.plan.encoder:
            return []
        return [*(tower.layers if tower else ()), *(observed.blocks if observed else ())]

    def _rectifies(self) -> bool:
        """Whether the layer that runs was handed a term of rectified attention."""
        active = self.state.active
        return active is not None and active.rectifier is not None and active.rectifier.biased

    @staticmethod
    def _rectified(call: Call) -> None:
        """After an attention that should be rectified."""
        if call.bias is None:
            raise UnsupportedModelError(
                "rectify: this decoder's layers do not hand their attention what they are given; "
                "leave rectify out"
            )

    def _in_prefill(self) -> bool:
        return self.state.prefill is not None

    # ------------------------------------------------------------------ vision

    def image_records(
        self, layouts: list[ImageLayout], tower: TowerPass | ObservedPass | None,
        projected: Tensor | None, device: torch.device,
    ) -> list[ImageRecord]:  # fmt: skip
        """What an encoder pass left of these images: ``tower`` and the projector's output [tiles,
        T, D], where stages can work there."""
        if not isinstance(tower, TowerPass) or projected is None:
            records = [ImageRecord(layout, self.facts.tower, device) for layout in layouts]
            if isinstance(tower, ObservedPass):
                tower.fill(records)
            return records
        assert self.parts.tower is not None
        if self.parts.tower.scale != 1:
            projected = projected * self.parts.tower.scale
        want_raw = any(stage.wants_raw for stage in self.plan.prompt)
        newline = self.family.newline(self.parts)
        return build_records(layouts, tower, projected, newline, self.spatial, want_raw)

    def _reduced_features(self, module: nn.Module, args: Any) -> Any:
        """transformers 4.57 records the hidden states of SigLIP towers inside the blocks' forward,
        before any hook: what a stage did at the feature layer itself would be lost."""
        tower = self.state.tower
        owner = self.parts.tower
        if tower is None or tower.features is None or (owner is not None and owner.reads_output):
            return None
        if not tower.reduced and owner is not None and owner.resampler and tower.tower.has_videos:
            return None  # the model has pooled their frames
        return tower.features[:, tower.cut_rows :].to(args[0].device), *args[1:]

    def _projector(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        tower = self.state.tower
        if tower is None:
            return None
        self.state.projected = output
        return tower.full_grid(output) if tower.reduced else None

    # ------------------------------------------------------------------ forward

    def _language_model_input(self, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Before the language model: choose what is left of the images, or prepare a step on a
        short cache. The model then makes masks and positions for the whole prompt."""
        refuse_replica(module)
        self.step.on = False
        self.entry.language_model_input(kwargs)
        self._current.alive = None
        self._check_backend()
        state, cache = self.state, cache_in(kwargs)
        state.step = None  # of an earlier call of the language model alone
        mask = kwargs.get("attention_mask")
        real = mask if isinstance(mask, Tensor) and mask.dim() == 2 else state.attention_mask
        calls = LayerCalls(module, mask, real, self.family.legacy)
        if state.layout is None:
            layers = getattr(cache, "layers", ())
            if any(isinstance(layer, CompressedLayer) for layer in layers):
                state.calls, state.step = calls, StepPass(calls, cache, self.plan.rectify)
                hand_over(module, kwargs, self._current)
                return args, kwargs
            return None
        embeds = kwargs["inputs_embeds"]
        past = seen(cache)
        if self.family.legacy and cache is None and _uses_cache(module, kwargs):
            kwargs["past_key_values"] = new_cache(module.config)
        state.finite = torch.isfinite(embeds).all()
        layout, source, drop = state.layout, None, None
        if state.records is not None and self.plan.encoder:
            wider = widened(layout, state.records)
            if wider is not None:
                layout, source = wider
                real = widen_arguments(kwargs, source, layout.valid, past, real)
                embeds, mask = kwargs["inputs_embeds"], kwargs["attention_mask"]
                calls = LayerCalls(module, mask, real, self.family.legacy)
        native = native_sequence(layout, embeds.device, state.layout.segment.shape[1])
        if (records := state.records) is not None:
            chosen = select_visual(
                embeds, layout, records, self.plan.prompt, self.compact, self.contracts,
                self.plan.rectify,
            )  # fmt: skip
            kwargs["inputs_embeds"], drop, native.tag = chosen.embeds, chosen.drop, chosen.tag
            native.size = chosen.size
            state.entered, state.selections = chosen.images, chosen.answers
        first = 0 if drop is not None else min(
            (n for stage in self.plan.decoder for n in stage.prune_before),
            default=len(self.parts.decoder_layers),
        )  # fmt: skip
        state.calls = calls
        for layer in self.layers:
            layer.enter()
        held = PrefillCache(past, real, native, source, layout.text_behind, layout.guesses)
        state.prefill = PrefillPass(
            calls, self.plan.decoder, native, held, self.contracts,
            self.family.attention_ahead, drop, self.family.deep(kwargs, first), layout.guesses,
            self.plan.rectify,
        )  # fmt: skip
        if state.entered is not None:
            for run in state.prefill.runs:
                run.images(state.entered)
        hand_over(module, kwargs, self._current)
        return args, kwargs

    def _check_backend(self) -> None:
        decoder = self.parts.language_model
        backend = check_backend(backend_of(decoder), "language model")
        check_rectify(self.plan.rectify, backend, decoder.config, self.family.legacy)
        if backend.startswith("flash") and self.family.drops_blocks_under_flash:
            raise UnsupportedModelError(
                f"attn_implementation={backend!r} hides from the tokens of an image in "
                f"{type(self.model).__name__} those that stand after them, which the model was "
                "trained to see; use 'sdpa' or 'eager'"
            )

    def _rotary(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if (calls := self.state.calls) is not None:
            forward: Any = module.forward
            calls.rotary.append(RotaryCall(forward, args, kwargs, output))

    def _before_layer(self, number: int, block: Block) -> Any:
        def hook(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            active = self.state.active
            return None if active is None else active.prepare(number, block, args, kwargs)

        return self._guarded(hook)

    def _after_layer(self, number: int) -> Any:
        def hook(layer: nn.Module, args: Any, output: Any) -> Any:
            prefill = self.state.prefill
            if prefill is None or not prefill.deep:
                return None
            whole = isinstance(output, tuple)
            new = prefill.add_deep(number, output[0] if whole else output)
            return (new, *output[1:]) if whole and new is not None else new

        return hook

    def _tap(self, number: int) -> Any:
        def tap(call: Call) -> None:
            if (prefill := self.state.prefill) is not None:
                prefill.attention(number, call)

        return self._guarded(tap)

    def _transition(self, number: int, name: Literal["attention", "mlp"]) -> Any:
        inputs = threading.local()

        def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            if self.state.prefill is not None:
                inputs.hidden = args[0] if args else kwargs["hidden_states"]

        def after(module: nn.Module, args: Any, output: Any) -> None:
            if (prefill := self.state.prefill) is not None:
                made = output[0] if isinstance(output, tuple) else output
                with torch.no_grad():  # scores need no gradient
                    prefill.transition(number, name, inputs.__dict__.pop("hidden"), made)

        return before, self._guarded(after)

    def _guarded(self, hook: Any) -> Any:
        return guarded(hook, lambda: self.state.finite)

    def _decoded(self, module: nn.Module, args: Any, output: Any) -> Any:
        """After the language model: prune caches, check features, write the trace."""
        state = self.state
        state.calls = None
        if state.step is not None:
            self.trace.record_step()
        if state.prefill is None:
            return None
        if state.finite is not None:
            _check_finite(state.finite)
        prefill = state.prefill
        prefill.finish()
        assert state.layout is not None
        self.trace.record_prefill(
            PrefillRecord(
                self.bound, self.plan, prefill, state.layout, state.records,
                state.entered or [], state.selections or [],
            )
        )  # fmt: skip
        if prefill.sequence is prefill.native:
            return self._right_aligned(output, state.layout)
        self._current.alive = Alive(prefill.cache.users(prefill.sequence.column))
        return None

    def _right_aligned(self, output: Any, layout: PromptLayout) -> Any:
        """The language model's output with padding at the left, as it is where something was
        dropped: the last hidden state of a row is that of its last token."""
        if bool(layout.valid[:, -1].all()):  # host tensors
            return None
        length = layout.valid.shape[1]
        key = torch.where(layout.valid, torch.arange(length), -1)
        index = key.sort(dim=1, stable=True).indices
        hidden = output[0]
        self._current.alive = Alive(key.gather(1, index), back=index.argsort(1))
        index = index.to(hidden.device)[:, :, None].expand(-1, -1, hidden.shape[2])
        aligned = hidden.gather(1, index)
        if isinstance(output, tuple):
            return (aligned, *output[1:])
        output.last_hidden_state = aligned
        return output


def _never() -> bool:
    return False


def _check_finite(finite: Tensor) -> None:
    """Raise for NaN or infinite features; read at the end of the prefill, where the caller is
    about to look at the logits anyway."""
    if not bool(finite):
        raise not_finite()


def _uses_cache(module: Any, kwargs: dict[str, Any]) -> bool:
    use = kwargs.get("use_cache")
    return bool(module.config.use_cache if use is None else use)
