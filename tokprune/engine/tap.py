"""A tap on attention: the q, k and v that the backend is given, without a second projection.

A tapped attention module gets a config of its own, a copy that names our attention function. That
function runs the model's backend unchanged, under the model's own config, and hands q, k and v to
the tap; so masks, kernels and special cases stay those of the backend, other modules and threads
see nothing of it, and taking the tap out puts the module's config back.
"""

from __future__ import annotations

import copy
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokprune.engine.compat import AttentionInterface
from tokprune.errors import UnsupportedModelError
from tokprune.operators.rectified import extended

NAME = "tokprune_tap"
_ATTRIBUTE = "_tokprune_tap"
#: the argument by which a layer's attention is rectified: what each key's logits get [B, m]
#: float32, or the mask [B, 1, n, m], where that holds it already
BIAS = "tokprune_bias"


@dataclass(frozen=True, eq=False)
class Call:
    """A call of an attention backend: ``query`` [B, H, Lq, d], ``key``, ``value`` [B, Hkv, Lk, d],
    ``mask`` in the backend's form; ``window``: tokens, where the backend slides them itself;
    ``rotary``: cos and sin [B, Lq, d] where no argument of the layer holds them; ``bias``: what
    rectified attention adds (see ``BIAS``)."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    window: int | None = None
    softcap: float | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    bias: Tensor | None = None


TapFunction = Callable[[Call], None]


class _Captured(BaseException):
    """Leaves a layer at its attention; never seen outside :func:`capture`."""

    def __init__(self, call: Call) -> None:
        self.call = call


_capturing = threading.local()


def capture(module: Any, run: Callable[[], Any]) -> Call:
    """The attention call of a tapped module, on which ``run()`` comes to its end.

    Raises:
        RuntimeError: ``run()`` did not reach the module's attention.
    """
    with _capture(module):
        try:
            run()
        except _Captured as captured:
            return captured.call
    raise RuntimeError(f"{type(module).__name__} did not call its attention backend")


@contextmanager
def _capture(module: Any) -> Iterator[None]:
    _capturing.module = module
    try:
        yield
    finally:
        _capturing.module = None


class Tap:
    """One tap of a module; with the last of them, :meth:`remove` gives its config back."""

    def __init__(self, module: Any, function: TapFunction, wanted: Callable[[], bool]) -> None:
        self.module, self.function, self.wanted = module, function, wanted

    def remove(self) -> None:
        tapped = _tapped(self.module)
        if tapped is None or self not in tapped.taps:
            return
        tapped.taps = tuple(tap for tap in tapped.taps if tap is not self)
        if not tapped.taps:
            self.module.config = tapped.config


class _Tapped:
    """The model's own config of a module, and its taps: one of each model that shares it."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.taps: tuple[Tap, ...] = ()

    def copied(self) -> Any:
        """A config that names our attention function. Copied, pickled or written, it is the
        model's own."""
        config = self.config
        own = copy.copy(config)
        own._attn_implementation_internal = NAME
        own.__dict__.update(
            {_ATTRIBUTE: self, "to_dict": config.to_dict, "__reduce_ex__": config.__reduce_ex__,
             "__deepcopy__": functools.partial(copy.deepcopy, config)}
        )  # fmt: skip
        return own


def _tapped(module: Any) -> _Tapped | None:
    # kept on the module's own config, so that module and taps go together
    return module.config.__dict__.get(_ATTRIBUTE)  # type: ignore[no-any-return]


def tapped_backend(module: Any) -> str | None:
    """The backend that an attention module runs on, tapped or not."""
    tapped = _tapped(module)
    config = module.config if tapped is None else tapped.config
    return getattr(config, "_attn_implementation", None)


class _UnderOwnConfig:
    """A module as its backend is to see it: everything the module's, but the model's config."""

    def __init__(self, module: nn.Module, config: Any) -> None:
        self._module, self.config = module, config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _backend(module: Any, name: str) -> Callable[..., Any]:
    if name == "eager":
        # Eager attention is a plain function of each modeling file, in no registry.
        return sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[no-any-return]
    return AttentionInterface()[name]  # type: ignore[no-any-return]


def _tapped_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, **kwargs: Any,
) -> Any:  # fmt: skip
    tapped = _tapped(module)  # None: another thread took the taps out just now
    config, taps = (module.config, ()) if tapped is None else (tapped.config, tapped.taps)
    # nobody looks at a step, and a graph could not ask
    step = torch.compiler.is_compiling() and query.shape[2] == 1
    captured = not step and getattr(_capturing, "module", None) is module
    wanting = [] if step else [tap for tap in taps if tap.wanted()]
    call, bias = None, kwargs.pop(BIAS, None)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if captured or wanting:
        call = Call(
            query, key, value, attention_mask, scale, kwargs.get("sliding_window"),
            kwargs.get("softcap"), bias=bias,
        )  # fmt: skip
        if captured:
            raise _Captured(call)
    backend = config._attn_implementation
    run = functools.partial(_backend(module, backend), _UnderOwnConfig(module, config), **kwargs)
    if bias is None or bias.dim() == 4:  # the mask holds it
        result = run(query, key, value, attention_mask, scaling=scaling)
    else:
        result = _rectified(run, backend, query, key, value, attention_mask, bias, scale, kwargs)
    if call is not None:
        # scores need no gradient; and what is recomputed for one (checkpointing) reads nothing
        with torch.no_grad():
            for tap in wanting:
                tap.function(call)
    return result


def _rectified(
    run: Callable[..., Any], backend: str, query: Tensor, key: Tensor, value: Tensor,
    mask: Tensor | None, bias: Tensor, scale: float, kwargs: dict[str, Any],
) -> Any:  # fmt: skip
    """A backend with ``bias`` [B, Lk] added to the logits: by channels, which all kernels take; or,
    for single queries, by the mask, as then the cached keys need not be copied."""
    bias = bias.to(key.device)
    bounded = backend == "eager" and kwargs.get("softcap") is not None
    if not backend.startswith("flash") and (query.shape[2] == 1 or bounded):
        return run(query, key, value, _with_bias(mask, bias, query, key), scaling=scale)
    own = extended(query, key, value, bias, scale)
    output, *others = run(own.query, own.key, own.value, mask, scaling=scale)
    return output[..., : value.shape[-1]], *others


def _with_bias(mask: Tensor | None, bias: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """A mask [B, 1, Lq, Lk] in the form that is added, with ``bias`` [B, Lk]."""
    own = bias[:, None, None]
    if mask is None and query.shape[2] > 1:
        n, m = query.shape[2], key.shape[2]
        mask = torch.ones(n, m, dtype=torch.bool, device=query.device).tril(m - n)
    least = torch.finfo(query.dtype).min
    if mask is None:
        return own.to(query.dtype)
    mask = mask[..., : key.shape[2]]  # of transformers 4, wider at times
    if mask.dtype == torch.bool:
        return own.to(query.dtype).masked_fill(~mask, least)
    return (mask.float() + own).clamp(min=least).to(query.dtype)


def install_tap(module: Any, function: TapFunction, wanted: Callable[[], bool]) -> Tap:
    """Call ``function`` in every forward of an attention module during which ``wanted()`` is true.

    Raises:
        UnsupportedModelError: the module computes its attention by itself, out of reach.
    """
    files = [sys.modules.get(cls.__module__) for cls in type(module).__mro__]
    if not any(hasattr(file, "ALL_ATTENTION_FUNCTIONS") for file in files):
        raise UnsupportedModelError(
            f"{type(module).__name__} of this release of transformers computes its attention by "
            "itself, out of reach of methods that rank by it; use a newer release, or a method "
            "that works at the language-model input (divprune, cdpruner, …)"
        )
    if NAME not in AttentionInterface().valid_keys():
        AttentionInterface.register(NAME, _tapped_attention)
    tap, tapped = Tap(module, function, wanted), _tapped(module)
    if tapped is None:
        tapped = _Tapped(module.config)
        module.config = tapped.copied()
    tapped.taps += (tap,)
    return tap
