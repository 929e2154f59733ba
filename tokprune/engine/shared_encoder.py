"""One pass of the vision encoder for several methods that look at the same pixels."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tokprune.engine.contracts import EncoderOutcome, EncoderStage
from tokprune.engine.copies import Guard
from tokprune.engine.family import BoundModel
from tokprune.errors import AlreadyPatchedError, UnsupportedModelError

#: the methods of a multimodal module that run its vision encoder
ENCODERS = ("get_image_features", "get_video_features")


@dataclass(frozen=True)
class Encoded:
    """What one pass left: the method's result, the projector's output [tiles, T, D], and the
    outcome of every observing stage."""

    result: Any
    projected: Tensor | None
    outcomes: list[EncoderOutcome]


class SharedEncoder:
    """While open, passes of the vision encoder over chosen pixels are remembered and reused.

    A pass is reused by the unpatched model and by every method whose encoder stages only observe,
    and observe the same (:attr:`EncoderStage.share_key`). Stages that drop or merge rows always
    run. Nothing is recomputed in another way, so results are those of the model on its own, bit
    for bit. Only calls with the very tensor given to :meth:`remember` are shared.

    Example::

        with SharedEncoder(tokprune.families.bind(model)) as shared:
            shared.remember(inputs["pixel_values"])
            plain = model.generate(**inputs)
            with tokprune.compress(model, "divprune", keep=64):
                pruned = model.generate(**inputs)  # the encoder does not run

    Raises:
        UnsupportedModelError: a model of the original ``llava`` package.
        AlreadyPatchedError: on entry, if the model is patched.
    """

    def __init__(self, bound: BoundModel) -> None:
        parts = bound.parts
        if bound.family.legacy:
            raise UnsupportedModelError(
                f"{type(bound.model).__name__}: one encoder pass for several methods is for models "
                "of transformers ≥ 4.57; models of the original llava package encode every time"
            )
        self.multimodal = parts.multimodal
        self.projector = None if parts.tower is None else parts.tower.projector
        self.pixels: Tensor | None = None
        #: passes of the tower that ran, and that were spared
        self.ran = self.spared = 0
        self._passes: dict[tuple[Hashable, ...], Encoded] = {}

    def __enter__(self) -> SharedEncoder:
        if "get_image_features" in self.multimodal.__dict__:
            raise AlreadyPatchedError("unpatch the model before its encoder outputs are shared")
        #: the model's own methods by name, and those that remember
        self.original = {n: getattr(self.multimodal, n) for n in ENCODERS
                         if hasattr(self.multimodal, n)}  # fmt: skip
        self.unpatched = {name: self._wrap(own) for name, own in self.original.items()}
        self.multimodal.__dict__.update(self.unpatched)
        Guard.of(self.multimodal).names.update(ENCODERS)
        _open[self.multimodal] = weakref.ref(self)
        return self

    def __exit__(self, *_: Any) -> None:
        _open.pop(self.multimodal, None)
        own = self.multimodal.__dict__
        for name, method in self.unpatched.items():
            if own.get(name) is method:
                del own[name]
        Guard.of(self.multimodal).release((), ENCODERS)
        self.remember(None)

    def remember(self, pixels: Tensor | None) -> None:
        """Forget earlier passes; share those over ``pixels`` from now on (None: share nothing)."""
        self.pixels = pixels
        self._passes.clear()

    def get(self, pixels: Tensor, keys: tuple[Hashable, ...] | None) -> Encoded | None:
        """The pass over ``pixels`` by stages of these keys, if there was one."""
        shares = keys is not None and pixels is self.pixels
        found = self._passes.get(keys) if shares else None  # type: ignore[arg-type]
        self.spared += found is not None
        return found

    def put(self, pixels: Tensor, keys: tuple[Hashable, ...] | None, encoded: Encoded) -> None:
        """Remember a pass that ran, if stages of these keys can be served by it again."""
        self.ran += 1
        if keys is not None and pixels is self.pixels:
            self._passes[keys] = encoded

    def _wrap(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """A method of the unpatched model, from memory where there is something."""
        signature = inspect.signature(original)
        first = next(iter(signature.parameters))

        @functools.wraps(original)
        def encode(*args: Any, **kwargs: Any) -> Any:
            pixels = signature.bind(*args, **kwargs).arguments[first]
            known = self.get(pixels, ())
            if known is not None:
                return known.result
            made: list[Tensor] = []
            handles = []
            if self.projector is not None:
                keep = lambda *call: made.append(call[2])  # noqa: E731
                handles.append(self.projector.register_forward_hook(keep))
            try:
                result = original(*args, **kwargs)
            finally:
                for handle in handles:
                    handle.remove()
            self.put(pixels, (), Encoded(result, made[-1] if made else None, []))
            return result

        return encode


_open: weakref.WeakKeyDictionary[nn.Module, weakref.ref[SharedEncoder]] = (
    weakref.WeakKeyDictionary()
)


def shared_encoder(multimodal: nn.Module) -> SharedEncoder | None:
    """The open :class:`SharedEncoder` of a model, if there is one."""
    reference = _open.get(multimodal)
    return None if reference is None else reference()


def share_keys(stages: Sequence[EncoderStage]) -> tuple[Hashable, ...] | None:
    """What the encoder stages of a plan observe; None if one of them does more than that."""
    keys = tuple(stage.share_key for stage in stages)
    if any(stage.reduces or stage.alters for stage in stages) or None in keys:
        return None
    return keys
