"""Decode steps on static caches that ``torch.compile`` follows, hooks and all.

What a hook has to do in such a step follows from the call and from tensors in the cache: nothing is
kept in the thread, and nothing on the host changes from step to step. Whatever is not such a step
(prompts, caches that grow, flash attention) is left to the hooks that run in Python.

Each function here stands for one hook of the engine and takes what that hook takes; it returns
``NotImplemented`` where the hook itself has to run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from tokprune.engine import masks
from tokprune.engine.cache import cache_in
from tokprune.engine.positions import RotaryCall, made_by, shifted
from tokprune.engine.static_cache import CompressedStaticLayer, is_static
from tokprune.engine.tap import BIAS


def is_step(cache: Any, tokens: int) -> bool:
    """Whether a call of ``tokens`` tokens on a cache is a step that can be followed."""
    if tokens != 1 or not is_static(cache):
        return False
    own = [layer for layer in cache.layers if isinstance(layer, CompressedStaticLayer)]
    return all(layer.filled is not None for layer in own)


def nothing_to_do(arguments: Sequence[str]) -> Callable[..., Any]:
    """For hooks around a model or its multimodal part, which have no work in a step;
    ``arguments``: names of the positional ones."""

    def hook(module: Any, args: Any, kwargs: dict[str, Any], *output: Any) -> Any:
        call = {**dict(zip(arguments, args)), **kwargs}
        ids = call.get("input_ids")
        given = call.get("inputs_embeds") if ids is None else ids
        labelled = call.get("labels") is not None or call.get("shift_labels") is not None
        if given is None or labelled or not is_step(cache_in(call), given.shape[1]):
            return NotImplemented
        return None

    return hook


class TracedStep:
    """The step that is being traced; one for a session."""

    def __init__(self, language_model: Any) -> None:
        self.language_model = language_model
        #: whether the newest call of the language model was one
        self.on = False
        #: of the step, until it ends: the mask that the language model was given, calls of its
        #: rotary modules, and by shift and call the tables that they make of moved positions
        self.mask: Any = None
        self.rotary_calls: tuple[RotaryCall, ...] = ()
        self.tables: dict[tuple[int, int], Any] = {}

    def language_model_input(self, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Before the language model."""
        cache, embeds = cache_in(kwargs), kwargs.get("inputs_embeds")
        if args or embeds is None or not is_step(cache, embeds.shape[1]):
            return NotImplemented
        if masks.backend_of(self.language_model) not in ("sdpa", "eager"):
            return NotImplemented
        self.on, self.mask = True, kwargs.get("attention_mask")
        self.rotary_calls, self.tables = (), {}
        return None

    def rotary(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """After a rotary module of the language model."""
        if not self.on:
            return NotImplemented
        call = RotaryCall(module.forward, args, kwargs, output)
        self.rotary_calls = (*self.rotary_calls, call)
        return None

    def before_layer(self, number: int, window: int | None) -> Callable[..., Any]:
        """Before a decoder layer: its mask and positions, for what its buffer holds."""

        def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            cache = cache_in(kwargs)
            if not self.on or hidden.shape[1] != 1 or cache is None:
                return NotImplemented
            layer = cache.layers[number]
            if not isinstance(layer, CompressedStaticLayer):
                return None
            layer.expect_traced_step()
            mask = self._mask(layer, kwargs.get("attention_mask"), window, hidden)
            kwargs = {**kwargs, "attention_mask": mask}
            if layer.buffer_log_sizes is not None:
                kwargs[BIAS] = layer.buffer_log_sizes
            if layer.shift is not None:
                self._move(layer, layer.shift, kwargs)
            return args, kwargs

        return hook

    def decoded(self, module: Any, args: Any, output: Any) -> Any:
        """After the language model."""
        if not self.on:
            return NotImplemented
        self.mask, self.rotary_calls, self.tables = None, (), {}
        return None

    def inside_layer(self, *_: Any) -> Any:
        """For hooks that work in prefills only."""
        return None if self.on else NotImplemented

    # ------------------------------------------------------------------ masks

    def _mask(
        self, layer: CompressedStaticLayer, mask: Tensor | None, window: int | None, hidden: Tensor
    ) -> Tensor:
        slots, places = layer.buffer_slots, layer.buffer_places
        assert slots is not None
        assert layer.filled is not None
        now = layer.filled + layer.missing
        own = self._causal(slots, now, hidden) if mask is None else masks.columns(mask, slots)
        if window is None or places is None:
            return own
        whole = self.mask
        if isinstance(whole, dict):
            whole = whole.get("full_attention")
        if isinstance(whole, Tensor) and whole.dim() == 4:
            base = masks.columns(whole, slots)
        else:
            base = self._causal(slots, now, hidden)
        query = now if layer.place_shift is None else now - layer.place_shift[:, None]
        near, far = query - places < window, now - slots >= window
        return masks.moved_window(own, base, near[:, None], far[:, None])

    def _causal(self, slots: Tensor, now: Tensor, hidden: Tensor) -> Tensor:
        seen = (slots >= 0) & (slots <= now)
        backend = masks.backend_of(self.language_model) or ""
        return masks.in_form(backend, seen[:, None, None, :], hidden.dtype)

    # ------------------------------------------------------------------ positions

    def _move(self, layer: CompressedStaticLayer, shift: Tensor, kwargs: dict[str, Any]) -> None:
        for name, table in kwargs.items():
            if name.startswith("position_embeddings") and table is not None:
                call = made_by(self.rotary_calls, table)
                key = layer.shift_number, self.rotary_calls.index(call)
                if key not in self.tables:
                    self.tables[key] = call.again(shifted(call.ids, shift))
                kwargs[name] = self.tables[key]
        ids = kwargs.get("position_ids")
        if ids is not None and ids.dim() == 2:
            kwargs["position_ids"] = shifted(ids, shift)
