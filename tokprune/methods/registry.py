"""Methods by name: those of this package, and those that other installed packages bring."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

from tokprune.errors import did_you_mean
from tokprune.methods.base import Method
from tokprune.methods.composed import Composed, composed
from tokprune.methods.options import Renamed, is_sequence
from tokprune.plugins import plugins

M = TypeVar("M", bound=Method)

_METHODS: dict[str, type[Method]] = {}


def register_method(cls: type[M]) -> type[M]:
    """Class decorator: make a method available by its ``name``.

    A class that replaces itself (a notebook cell that is run again) is no conflict.

    Raises:
        TypeError: no class derived from :class:`Method`.
        ValueError: a name that is not lower case, or that another class has; says which.
    """
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise TypeError(f"{cls!r} should be a class derived from tokprune.methods.Method")
    where = f"{cls.__module__}.{cls.__qualname__}"
    name = getattr(cls, "name", None)
    if not isinstance(name, str) or not name or name != name.lower() or ":" in name:
        raise ValueError(
            f"name={name!r} of {where} should be a word in lower case without ':', for example "
            f"{cls.__name__.lower()!r}"
        )
    taken = _METHODS.get(name)
    if taken is not None and f"{taken.__module__}.{taken.__qualname__}" != where:
        raise ValueError(
            f"name={name!r} of {where} is taken by {taken.__module__}.{taken.__qualname__}; it "
            "should be another one"
        )
    _METHODS[name] = cls
    return cls


@functools.cache
def _load_plugins() -> None:
    """Methods of other packages, once; one whose name is taken is left out with a warning."""
    for entry, found, package in plugins("methods"):
        try:
            if isinstance(found, type):  # a module has registered its methods on import
                register_method(found)
        except (TypeError, ValueError) as error:
            warnings.warn(f"method {entry!r} of package {package!r}: {error}", stacklevel=2)


def available_methods() -> dict[str, type[Method]]:
    """All registered methods by name, sorted; those of other packages (entry points
    ``tokprune.methods``) among them."""
    _load_plugins()
    return dict(sorted(_METHODS.items()))


def image_methods() -> dict[str, type[Method]]:
    """Those that work on still images, by name, sorted."""
    return {name: cls for name, cls in available_methods().items() if not cls.videos_only}


def make_method(method: str | Method, **options: Any) -> Method:
    """A method object from a name and options (or an object, whose options may be changed).

    Options by names of an earlier release are taken, with a warning. ``compose`` has one option,
    ``methods``: names, methods, or tables with ``method`` and ``options``.

    Raises:
        ValueError: unknown name, an option the method does not have (suggests the nearest), or one
            with a bad value.
        TypeError: ``method`` is neither a name nor a method object.
    """
    if isinstance(method, Method):
        return dataclasses.replace(method, **_checked(type(method), options)) if options else method
    if not isinstance(method, str):
        raise TypeError(f"method={method!r} should be a method name or a tokprune method object")
    if method.lower() == Composed.name:
        return composed(_parts(options))
    known = available_methods()
    cls: type[Method] | None = known.get(method.lower())
    if cls is None:
        hint = did_you_mean(method.lower(), known)
        raise ValueError(f"method={method!r} is unknown; known: {', '.join(known)}.{hint}")
    options = _checked(cls, options)
    for field in dataclasses.fields(cls):
        required = {field.default, field.default_factory} == {dataclasses.MISSING}
        if field.init and required and field.name not in options:
            what = ": visual tokens per image to keep, as a count or a fraction"
            raise ValueError(
                f"option {field.name!r} is required by {cls.name}"
                + (what if field.name == "keep" else "")
            )
    return cls(**options)


def _parts(options: Mapping[str, Any]) -> list[Method]:
    """What the options of ``compose`` put together.

    Raises:
        ValueError, TypeError: they are others, or a part is no method; says which.
    """
    for name in options:
        if name != "methods":
            raise ValueError(f"option {name!r} is unknown to compose; it has: methods")
    listed: Any = options.get("methods")
    if not is_sequence(listed):
        raise ValueError(
            f"methods={listed!r} of compose should be a list of methods, each a table with "
            "'method' and 'options'"
        )
    return [_part(number, part) for number, part in enumerate(listed)]


def _part(number: int, part: Any) -> Method:
    where = f"methods[{number}] of compose"
    if not isinstance(part, Mapping):
        try:
            return make_method(part)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{where}: {error}") from None
    name, own = part.get("method"), part.get("options", {})
    if not isinstance(name, str) or not isinstance(own, Mapping) or part.keys() - _TABLE:
        raise ValueError(
            f"{where}={dict(part)!r} should be a table with 'method', a name, and 'options', a "
            "table"
        )
    try:
        return make_method(name, **own)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{where}: {error}") from None


#: keys of a part of a composition
_TABLE = frozenset({"method", "options"})


def option_names(cls: type[Method]) -> list[str]:
    return [field.name for field in dataclasses.fields(cls) if field.init]


def _checked(cls: type[Method], options: dict[str, Any]) -> dict[str, Any]:
    """Options by the names of today."""
    names, current = option_names(cls), {}
    for name, value in options.items():
        now = next((n for n in (*cls.renamed, *_RENAMED) if n.old == name), None)
        if name not in names and now is not None:
            warnings.warn(
                f"option {name!r} of {cls.name} is called {now.name!r} now (decoder layers count "
                f"from 0, and tokens go before them): {name}={value!r} is "
                f"{now.name}={now.value(value)!r}. The old name goes with the next release",
                FutureWarning,
                stacklevel=3,
            )
            name, value = now.name, now.value(value)
        if name not in names:
            hint = did_you_mean(name, names)
            raise ValueError(
                f"option {name!r} is unknown to {cls.name}; it has: {', '.join(names)}.{hint}"
            )
        if name in current:
            raise ValueError(f"option {name!r} of {cls.name} is given twice, by two of its names")
        current[name] = value
    return current


#: what every method's options were called in the release before
_RENAMED = (Renamed("per", "video_unit"),)


def options_for_depth(name: str, decoder_layers: int) -> dict[str, Any]:
    """Layer options of a method, by name, for a decoder of this depth
    (:meth:`Method.options_for_depth`)."""
    return available_methods()[name].options_for_depth(decoder_layers)
