"""The method interface: a published recipe as a frozen dataclass of hyper-parameters."""

from __future__ import annotations

import dataclasses
import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias, TypeVar

from tokprune.engine.contracts import ModelFacts, Plan, VideoUnit

#: a count of tokens, a fraction of them, or one of these per pruning step
BudgetSchedule: TypeAlias = "int | float | Sequence[int | float]"
Budget: TypeAlias = "int | float"

M = TypeVar("M", bound="Method")


@dataclass(frozen=True)
class Preset:
    """A published setting: ``budget`` visual tokens on ``model``, and the options behind it."""

    model: str
    budget: int | float | str
    options: dict[str, Any]
    source: str


@dataclass(frozen=True)
class Method(ABC):
    """Base of all methods. Subclasses are frozen dataclasses; ``repr`` is the configuration.

    What a budget (``keep``) counts is the same for all of them. Of a still picture it is the whole
    picture, its tiles together, except where a method says that it is every tile. Of a video it is
    what the option ``video_unit`` names, which every method has:

    Args:
        video_unit: what of a video is compressed as one, with the budget and the scores of its own:
            "video" (default), all its frames together; a whole number n, segments of n consecutive
            frames, the last one of those left over; "frame", each frame as if it were a picture.
            Still pictures do not care, and methods that work tile by tile (``pool``, ``m3``) treat
            every frame alike anyway.

    Class attributes: ``name`` (the word for ``compress`` and the command line), ``stages`` (for
    people: where it acts), ``needs`` (what it reads), ``paper`` (citation), ``presets``,
    ``videos_only`` (it has nothing to drop in still pictures).
    """

    name: ClassVar[str]
    stages: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[str] = "features"
    paper: ClassVar[str] = ""
    presets: ClassVar[tuple[Preset, ...]] = ()
    videos_only: ClassVar[bool] = False

    video_unit: VideoUnit = field(default="video", kw_only=True)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__repr__" not in cls.__dict__:  # before the dataclass decorator makes another
            cls.__repr__ = _configuration  # type: ignore[assignment,method-assign]

    @abstractmethod
    def plan(self, facts: ModelFacts) -> Plan:
        """The stages of this method on a model.

        Raises:
            ValueError: an option does not fit the model (names option, value, and what would).
            UnsupportedModelError: the model lacks something the method needs.
        """

    @classmethod
    def preset(cls: type[M], model: str, budget: int | float | str, **changes: Any) -> M:
        """The published setting for ``model`` ("llava-1.5", "llava-next") and token budget.

        Raises:
            ValueError: nothing is published for them; lists what is.
        """
        for preset in cls.presets:
            if preset.model == model and preset.budget == budget:
                return cls(**{**preset.options, **changes})
        known = ", ".join(f"({p.model!r}, {p.budget!r})" for p in cls.presets) or "none"
        raise ValueError(
            f"{cls.__name__}.preset({model!r}, {budget!r}) is not published; presets: {known}"
        )


def _configuration(method: Method) -> str:
    """Class and options; ``video_unit`` where it is not the default: pictures never show it."""
    fields = [f for f in dataclasses.fields(method) if f.repr and f.name != "video_unit"]
    fields += [
        f
        for f in dataclasses.fields(method)
        if f.name == "video_unit" and method.video_unit != f.default
    ]
    options = ", ".join(f"{f.name}={getattr(method, f.name)!r}" for f in fields)
    return f"{type(method).__qualname__}({options})"


_METHODS: dict[str, type[Method]] = {}


def register_method(cls: type[M]) -> type[M]:
    """Class decorator: make a method available by its ``name``."""
    _METHODS[cls.name] = cls
    return cls


def available_methods() -> dict[str, type[Method]]:
    """All registered methods by name, sorted."""
    return dict(sorted(_METHODS.items()))


def image_methods() -> dict[str, type[Method]]:
    """Those that work on still pictures, by name, sorted."""
    return {name: cls for name, cls in available_methods().items() if not cls.videos_only}


def make_method(method: str | Method, **options: Any) -> Method:
    """A method object from a name and options (or an object, whose options may be changed).

    Raises:
        ValueError: unknown name, an option the method does not have (suggests the nearest), or one
            with a bad value.
        TypeError: ``method`` is neither a name nor a method object.
    """
    if isinstance(method, Method):
        if options:
            method = dataclasses.replace(method, **_checked(type(method), options))
        check_video_unit(method.video_unit)
        return method
    if not isinstance(method, str):
        raise TypeError(f"method={method!r} should be a method name or a tokprune method object")
    cls: type[Method] | None = _METHODS.get(method.lower())
    if cls is None:
        near = difflib.get_close_matches(method.lower(), _METHODS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"method={method!r} is unknown; known: {', '.join(sorted(_METHODS))}.{hint}"
        )
    _missing(cls, _checked(cls, options))
    check_video_unit(options.get("video_unit", "video"))
    return cls(**options)


def option_names(cls: type[Method]) -> list[str]:
    return [f.name for f in dataclasses.fields(cls) if f.init]


def _checked(cls: type[Method], options: dict[str, Any]) -> dict[str, Any]:
    names = option_names(cls)
    for name in options:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"option {name!r} is unknown to {cls.name}; it has: {', '.join(names)}.{hint}"
            )
    return options


def _missing(cls: type[Method], options: dict[str, Any]) -> None:
    for f in dataclasses.fields(cls):
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if f.init and required and f.name not in options:
            raise ValueError(
                f"option {f.name!r} is required by {cls.name}"
                + (": visual tokens per image to keep, as a count or a fraction"
                   if f.name == "keep" else "")
            )  # fmt: skip


# ------------------------------------------------------------------------------- checks


def check_keep(keep: Any, name: str = "keep") -> Budget:
    """A valid single budget: a positive count, or a fraction in (0, 1].

    Raises:
        ValueError: zero, negative, NaN, or a fraction above 1.
        TypeError: not a number.
    """
    if isinstance(keep, bool) or not isinstance(keep, (int, float)):
        raise TypeError(
            f"{name}={keep!r} should be a number of tokens (int ≥ 1) or a fraction (0 < float ≤ 1)"
        )
    if isinstance(keep, int):
        if keep < 1:
            raise ValueError(f"{name}={keep} should be at least 1 token")
    elif not math.isfinite(keep) or not 0 < keep <= 1:
        raise ValueError(
            f"{name}={keep} should be a fraction in (0, 1], or a whole number of tokens as int"
        )
    return keep


def check_range(value: float, name: str, low: float, high: float, low_open: bool = False) -> None:
    """``low ≤ value ≤ high`` (``low_open``: strictly above), or a ValueError naming the option."""
    inside = (low < value if low_open else low <= value) and value <= high
    if not (isinstance(value, (int, float)) and math.isfinite(value) and inside):
        bracket = "(" if low_open else "["
        raise ValueError(f"{name}={value!r} should be in {bracket}{low}, {high}]")


def check_video_unit(video_unit: Any) -> None:
    """What of a video is compressed as one.

    Raises:
        ValueError: it is neither "video" nor "frame" nor a whole number of frames.
    """
    whole = isinstance(video_unit, int) and not isinstance(video_unit, bool) and video_unit >= 1
    if video_unit not in ("video", "frame") and not whole:
        raise ValueError(
            f"video_unit={video_unit!r} should be 'video', 'frame', or a number of frames (at "
            "least 1)"
        )


def check_choice(value: Any, name: str, choices: Sequence[Any]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} should be one of {', '.join(map(repr, choices))}")


def check_fits(
    keep: Budget, facts: ModelFacts, limit: int | None = None, name: str = "keep"
) -> None:
    """A count must not exceed the tokens an image of this model can have.

    Raises:
        ValueError: names the count and the largest that makes sense.
    """
    limit = facts.max_visual_tokens if limit is None else limit
    if isinstance(keep, int) and keep > limit:
        raise ValueError(
            f"{name}={keep} is larger than the {limit} visual tokens of an image of this model; "
            f"it should be at most {limit}, or a fraction"
        )


def resolve_keep(keep: Budget, tokens: int) -> int:
    """Number of tokens to keep out of ``tokens``: a fraction is floored (at least 1), a count is
    capped where an image has fewer tokens than that."""
    if isinstance(keep, int):
        return min(keep, tokens)
    return min(tokens, max(1, int(keep * tokens)))
