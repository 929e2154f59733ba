"""Patch models as they are loaded."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from tokprune.integrations.exec.imports import AfterImport
from tokprune.plugins import plugins

if TYPE_CHECKING:
    from tokprune.methods.base import Method
    from tokprune.trace import Trace


class Load(NamedTuple):
    """A function by which models of a package are loaded: ``function`` (dotted, where it belongs to
    a class) of ``module``. It returns the model, or a tuple with the model in place ``at``."""

    package: str
    module: str
    function: str
    at: int


TRANSFORMERS = Load(
    "transformers", "transformers.modeling_utils", "PreTrainedModel.from_pretrained", 0
)


def known_loads() -> list[Load]:
    """That of transformers, and those of other packages (the ``LOAD`` of loaders that are
    installed)."""
    others = (getattr(loader, "LOAD", None) for _, loader, _ in plugins("loaders"))
    return [TRANSFORMERS, *(Load(*load) for load in others if load is not None)]


@contextmanager
def patch_on_load(method: str | Method, **options: Any) -> Iterator[list[Trace]]:
    """Inside this block every supported model that is loaded is patched, whoever loads it.

    That is what ``from_pretrained`` of transformers returns, and
    ``llava.model.builder.load_pretrained_model`` of the original ``llava`` package (modules that
    take that function by ``from … import`` must be imported inside the block). The models stay
    patched afterwards.

    Args:
        method: a method name with ``options``, or a method object (see :func:`tokprune.patch`).

    Yields:
        The traces of the models loaded so far, in their order.

    Raises:
        ValueError, TypeError: bad method or option; nothing is loaded then. When a model is loaded:
            the method does not fit it.
        tokprune.UnsupportedModelError: (when a model is loaded) it is of a supported class, and
            cannot be patched; says why. Other classes are left alone.

    Example::

        with tokprune.patch_on_load("divprune", keep=64) as traces:
            runpy.run_path("their_script.py", run_name="__main__")
        print(traces[0].summary())
    """
    from tokprune.methods.registry import make_method

    made = make_method(method, **options)
    traces: list[Trace] = []

    def loaded(load: Load, model: Any) -> None:
        trace = patch_loaded(load, model, made)
        if trace is not None:
            traces.append(trace)

    remove = watch_loads(known_loads(), loaded)
    try:
        yield traces
    finally:
        remove()


def patch_loaded(load: Load, model: Any, method: Method) -> Trace | None:
    """Patch a model; None: it is of no supported class, or for another package's loader."""
    from tokprune.api import patch
    from tokprune.errors import UnsupportedModelError
    from tokprune.families import family_of

    try:
        family = family_of(model)
    except UnsupportedModelError:
        return None
    return patch(model, method) if family.package == load.package else None


def watch_loads(loads: Sequence[Load], loaded: Callable[[Load, Any], None]) -> Callable[[], None]:
    """Have ``loaded`` called with every model that one of these functions returns, until what is
    returned here is called. Nothing is imported for it."""
    undo: list[Callable[[], None]] = []
    for load in loads:

        def replace(module: ModuleType, load: Load = load) -> None:
            undo.append(_replace(module, load, loaded))

        undo.append(AfterImport(load.module, replace).cancel)

    def remove() -> None:
        for step in reversed(undo):
            step()

    return remove


def _replace(
    module: ModuleType, load: Load, loaded: Callable[[Load, Any], None]
) -> Callable[[], None]:
    *path, name = load.function.split(".")
    owner = functools.reduce(getattr, path, module)
    original: Any = vars(owner)[name]
    of_class = isinstance(original, classmethod)
    function = original.__func__ if of_class else original

    @functools.wraps(function)
    def load_and_tell(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        loaded(load, result[load.at] if isinstance(result, tuple) else result)
        return result

    setattr(owner, name, classmethod(load_and_tell) if of_class else load_and_tell)
    return lambda: setattr(owner, name, original)
