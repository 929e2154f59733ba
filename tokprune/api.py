"""The user's verbs: patch, unpatch, compress, compose."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from tokprune.engine.check import check_plan
from tokprune.engine.contracts import Plan, Rectify
from tokprune.engine.family import BoundModel
from tokprune.engine.session import Session
from tokprune.errors import AlreadyPatchedError, CompositionError, UnsupportedModelError
from tokprune.families import bind, families_with_pieces, unwrap
from tokprune.methods.base import Method
from tokprune.methods.composed import composed
from tokprune.methods.registry import make_method
from tokprune.trace import Trace

# Sessions by model, and by the module in it that they are the way into: models that share that one
# (shallow copies, other heads) are patched together. A session is kept alive by the hooks it put on
# its model, and by nothing here: model and session refer to each other and go together.
_sessions: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Session]] = weakref.WeakKeyDictionary()


def session_of(model: Any) -> Session | None:
    """The session of a model, wrapped or not."""
    inner = unwrap(model)
    if not isinstance(inner, nn.Module):
        raise UnsupportedModelError(f"model={model!r} should be a model, or hold one")
    for module in (inner, *inner.__dict__.get("_modules", {}).values()):
        reference = None if module is None else _sessions.get(module)
        if reference is not None and (session := reference()) is not None:
            return session
    return None


def compose(*methods: str | Method) -> Method:
    """Run an encoder-stage, a prompt-stage and a decoder-stage method together.

    Whether the stages fit is decided per model, when it is patched.

    Raises:
        CompositionError: fewer than two methods, or different ``video_unit`` or ``rectify`` (here;
            one that rectifies does so for all), or two
            methods at the same stage (when patched; the message says why).
    """
    return composed([make_method(method) for method in methods])


def patch(
    model: nn.Module,
    method: str | Method,
    *,
    validate: bool | None = None,
    encode_at_once: int | None = None,
    **options: Any,
) -> Trace:
    """Compress the model's visual tokens from now on, until :func:`unpatch`.

    Patching again replaces the earlier method. Nothing of the model is changed but forward
    hooks; its config, weights and class stay as they are.

    Args:
        model: a supported transformers model (see :func:`supported_models`), or what holds one:
            adapters of peft, DistributedDataParallel, FSDP, compiled modules, pipelines, modules of
            one's own; so for all functions here. ``copy.deepcopy`` of it is patched alike, with a
            trace of its own.
        method: a method name with ``options``, or a method object.
        validate: check the values of all that the method answers, too, not types and shapes alone:
            for tests of methods, as it reads from the device (what ``torch.compile`` traces is not
            checked so). None: as
            :func:`tokprune.engine.check.set_validation` says, which is off at first.
        encode_at_once: how many images, tiles or frames of a video (temporal groups, where the
            model makes one of two frames) the vision encoder runs at a time; None: all, as the
            model does. With few, a long video takes less memory, and the same comes out. Tiles that
            the model stitches to an image stay together. What the encoder's methods return then
            holds the features alone, without hidden states.

    Returns:
        The trace, which shows the newest prefill.

    Raises:
        UnsupportedModelError: unknown model class, tower or attention backend; a wrapper that holds
            several models, or hides from the model where its images stand; ``encode_at_once`` for a
            model whose encoder cannot run in pieces.
        CompositionError: ``encode_at_once`` with a method that compares the images of a batch.
        ValueError, TypeError: bad method or option; the model then keeps its earlier state.
        AlreadyPatchedError: called inside a ``compress`` block of the same model, or another
            patched model has the same decoder.
        ContractError: the method answers with something that the engine cannot use (here, or in a
            forward); methods of this package do not.
    """
    if (current := session_of(model)) is not None and current.nested:
        raise AlreadyPatchedError(
            "the model is inside a tokprune.compress(...) block; leave it first, or combine the "
            "methods with tokprune.compose(...)"
        )
    return _start(model, method, options, validate, encode_at_once, nested=False).trace


def _start(
    model: nn.Module,
    method: str | Method,
    options: dict[str, Any],
    validate: bool | None,
    encode_at_once: int | None,
    nested: bool,
) -> Session:
    bound = bind(model)
    made = make_method(method, **options).on(bound.facts)
    plan = check_plan(made, made.plan(bound.facts), bound.facts)
    plan = replace(plan, video_unit=made.video_unit, rectify=Rectify.of(made.rectify))
    check_pieces(encode_at_once, bound, plan, made.name)
    session = Session(bound, plan, Trace(repr(made)), validate, encode_at_once)
    session.nested = nested
    session.copied = lambda copy: _start(copy, made, {}, validate, encode_at_once, nested=False)
    _check_decoder(session)
    unpatch(model)
    _install(session)
    return session


def check_pieces(most: Any, bound: BoundModel, plan: Plan, method: str) -> None:
    """Whether the encoder of a model can run so many images at a time with this plan.

    Raises:
        TypeError, ValueError: no whole number above 0.
        UnsupportedModelError: the family cannot cut its calls.
        CompositionError: a stage looks at all images of a batch together.
    """
    if most is None:
        return
    if not isinstance(most, int) or isinstance(most, bool):
        raise TypeError(f"encode_at_once={most!r} should be a whole number, or None")
    if most < 1:
        raise ValueError(f"encode_at_once={most} should be at least 1")
    if not bound.family.has_pieces:
        raise UnsupportedModelError(
            f"encode_at_once={most}: the vision encoder of {type(bound.model).__name__} cannot run "
            f"in pieces; that of these families can: {', '.join(families_with_pieces())}"
        )
    if any(stage.across == "call" for stage in plan.encoder):
        raise CompositionError(
            f"encode_at_once={most}: {method} as it is set takes of all images of a batch equally "
            "much inside the vision encoder, and would see some of them at a time; choose the "
            "option of it that lets every image stand for itself"
        )


def _install(session: Session) -> None:
    session.install()
    for module in (session.model, session.parts.multimodal):
        _sessions[module] = weakref.ref(session)


def _check_decoder(session: Session) -> None:
    """Two sessions cannot drive the same decoder (towers and projectors they can share).

    Raises:
        AlreadyPatchedError: another patched model has the same language model.
    """
    own = session.parts
    for reference in _sessions.values():
        other = reference()
        if other is None or other.parts.multimodal is own.multimodal:
            continue
        if other.parts.language_model is own.language_model:
            raise AlreadyPatchedError(
                f"the language model ({type(own.language_model).__name__}) of this "
                f"{type(session.model).__name__} is also that of a {type(other.model).__name__} "
                f"which is patched with {other.trace.method}; call tokprune.unpatch(...) on that "
                "model first: only one of them can be patched at a time"
            )


def unpatch(model: nn.Module) -> None:
    """Take all hooks out. Does nothing for a model that is not patched."""
    session = session_of(model)
    if session is not None:
        for module in (session.model, session.parts.multimodal):
            _sessions.pop(module, None)
        session.remove()


def is_patched(model: nn.Module) -> bool:
    """Whether a method is at work on the model."""
    return session_of(model) is not None


def trace_of(model: nn.Module) -> Trace | None:
    """The trace of a patched model, or None."""
    session = session_of(model)
    return None if session is None else session.trace


@contextmanager
def compress(
    model: nn.Module,
    method: str | Method,
    *,
    validate: bool | None = None,
    encode_at_once: int | None = None,
    **options: Any,
) -> Iterator[Trace]:
    """Compress visual tokens inside a ``with`` block; hooks go when it ends, however it ends.

    Arguments and errors as :func:`patch`. A model patched with :func:`patch` before gets its
    method back afterwards; a ``compress`` inside another one is refused.

    Example::

        with tokprune.compress(model, "todre", keep=64) as trace:
            out = model.generate(**inputs, max_new_tokens=64)
        print(trace.summary())
    """
    outer = session_of(model)
    if outer is not None and outer.nested:
        raise AlreadyPatchedError(
            "compress inside compress on the same model: the inner method would work on what the "
            "outer one left. Combine them with tokprune.compose(...), or end the outer block"
        )
    session = _start(model, method, options, validate, encode_at_once, nested=True)
    try:
        yield session.trace
    finally:
        if session_of(model) is session:
            unpatch(model)
            if outer is not None:
                _install(outer)
