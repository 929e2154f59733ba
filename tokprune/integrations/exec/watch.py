"""Count what a patched model is asked: with images and compressed, without, or past the patch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any

import torch
from torch import nn

from tokprune.api import trace_of
from tokprune.engine.cache import cache_in
from tokprune.families import bind
from tokprune.trace import PrefillTrace, Trace
from tokprune.trace.summary import visual_per_layer


def watch_text(model: nn.Module, told: Callable[[str, int], None]) -> None:
    """Have ``told(kind, prompts)`` called for prompts in which the method at work saw no image:

    - ``"text"``: there was none in it;
    - ``"beside"``: it came to the language model itself, as embeddings, which do not say what is an
      image: a script that puts its prompts together by itself;
    - ``"unpatched"``: the script has taken the patch off.

    A prompt is what starts a conversation. What ``torch.compile`` runs is not counted.
    """
    parts = bind(model).parts
    watch = _Watch(parts.multimodal, told)
    parts.multimodal.register_forward_pre_hook(watch.enter)
    parts.multimodal.register_forward_hook(watch.leave, always_call=True)
    parts.language_model.register_forward_pre_hook(watch.before, with_kwargs=True)
    parts.language_model.register_forward_hook(watch.after)


@dataclass
class _Watch:
    """State of one model's hooks; its methods are the hooks, so that a deep copy of the model has
    a watch of its own."""

    multimodal: nn.Module
    told: Callable[[str, int], None]
    #: threads in which the multimodal model runs
    _inside: set[int] = field(default_factory=set)
    #: kind and prompts of a call of the language model that starts conversations
    _open: tuple[str, int, int] | None = field(default=None)

    def enter(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self._inside.add(get_ident())

    def leave(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self._inside.discard(get_ident())

    def before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        self._open = None
        given = kwargs.get("inputs_embeds")
        if given is None:
            given = args[0] if args else kwargs.get("input_ids")
        if given is None or given.shape[1] == 1 or _past(kwargs):
            return
        beside = given.dim() == 3 and get_ident() not in self._inside
        self._open = "beside" if beside else "text", len(given), self._prefills()

    def after(self, *_: Any) -> None:
        if torch.compiler.is_compiling() or self._open is None:
            return
        kind, prompts, prefills = self._open
        if prefills < 0:
            self.told("unpatched", prompts)
        elif self._prefills() == prefills:
            self.told(kind, prompts)

    def _prefills(self) -> int:
        trace = trace_of(self.multimodal)
        return -1 if trace is None else trace.prefills


def _past(call: dict[str, Any]) -> bool:
    cache = cache_in(call)
    length = getattr(cache, "get_seq_length", None)
    return cache is not None and (length is None or int(length()) > 0)


@dataclass(frozen=True)
class Prompts:
    """Numbers of one prefill: prompts with images in it, those of which something was removed, and
    the visual tokens of all of them: as they came, in the last decoder layer, and in the mean of
    the decoder's layers."""

    prompts: int
    reduced: int
    before: int
    after: int
    mean: float

    @classmethod
    def of(cls, trace: Trace) -> Prompts:
        """Those of the newest prefill; nothing is read from the device for them."""
        prefill = trace.last
        assert prefill is not None
        full = prefill.original_counts
        layers = visual_per_layer(prefill)
        seen = [row for row, count in enumerate(full) if count]
        return cls(
            prompts=len(seen),
            reduced=sum(_reduced(prefill, row, layers) for row in seen),
            before=sum(full),
            after=sum(layers[-1]),
            mean=sum(map(sum, layers)) / len(layers),
        )


def _reduced(prefill: PrefillTrace, row: int, layers: list[list[int]]) -> bool:
    full = prefill.original_counts[row]
    return (
        any(counts[row] != full for counts in layers)
        or any(record.history for record in prefill.records_of(row))
        or any(
            layer.cached[row] < layer.lengths[row] for layer in prefill.layers if any(layer.cached)
        )
    )
