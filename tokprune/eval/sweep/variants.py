"""What a sweep compares: methods with options, and the controls that every method must beat."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tokprune.errors import did_you_mean
from tokprune.eval.sweep.identity import canonical
from tokprune.eval.sweep.reduced_input import REDUCED_INPUTS
from tokprune.methods import Method, available_methods, image_methods, make_method
from tokprune.methods.composed import Composed
from tokprune.methods.setting import as_tuples
from tokprune.words import option_value, split_outside

#: controls that leave the model as it is: ``none`` is the unpruned model, ``blind`` the same on an
#: empty image, ``downsample`` on a smaller one, and ``frames`` on fewer frames of a video
UNPATCHED = ("none", "blind", *REDUCED_INPUTS)
#: controls without a budget
UNBUDGETED = ("none", "blind")
#: set to true among a variant's options: run the method with exactly these, matched to no budget
AS_PUBLISHED = "as_published"
#: option that says which of a method's knobs meets the budgets, where that is not ``keep``
TURN = "turn"


def controls(media: str = "image") -> tuple[str, ...]:
    """Names of the controls, in the order of a run: those without a budget, methods that are
    yardsticks, and reduced inputs (``frames`` for videos only)."""
    methods = available_methods() if media == "video" else image_methods()
    yardsticks = [name for name, cls in methods.items() if cls.control]
    reduced = [name for name in REDUCED_INPUTS if media == "video" or name != "frames"]
    return (*UNBUDGETED, *yardsticks, *reduced)


class Turnable(Protocol):
    """What can be matched to a budget: a variant, or what a search tries."""

    @property
    def name(self) -> str: ...
    @property
    def method(self) -> str | None: ...
    @property
    def control(self) -> bool: ...
    @property
    def options(self) -> Mapping[str, Any]: ...
    @property
    def unpatched(self) -> str: ...
    @property
    def turn(self) -> str | None: ...
    def to_turn(self, decoder_layers: int, seed: int = 0) -> Method: ...
    def at(self, keep: int | float, decoder_layers: int, seed: int = 0) -> Method: ...


@dataclass(frozen=True)
class Variant:
    """One line of a plot: a method with its options, or a control."""

    #: None: a control that leaves the model unpatched
    method: str | None
    control: bool
    #: as typed, beside the budget; with ``as_published`` among them the whole setting: one point
    options: Mapping[str, Any] = field(default_factory=dict)
    #: name of an unpatched control
    unpatched: str = ""

    @property
    def name(self) -> str:
        """Its id, usable in file names: the method and its options."""
        if self.method is None:
            return self.unpatched
        parts = [f"{name}={_slug(value)}" for name, value in sorted(self.options.items())]
        return "+".join([self.method, *parts])

    @property
    def as_published(self) -> bool:
        """Whether the options are the whole setting, budget included."""
        return bool(self.options.get(AS_PUBLISHED))

    def published_method(self) -> Method:
        """The method object of a published setting.

        Raises:
            ValueError: options do not fit.
        """
        assert self.method is not None
        return make_method(self.method, **_without(self.options, AS_PUBLISHED))

    @property
    def turn(self) -> str | None:
        """The knob that meets the budgets; None: ``keep``."""
        turn: str | None = self.options.get(TURN)
        return None if turn == "keep" else turn

    @property
    def stochastic(self) -> bool:
        """Whether the answers depend on the seeds of a sweep."""
        if self.method is None or self.as_published:
            return False
        return self._made({} if self.turn else {"keep": 1}).stochastic

    def _made(self, budget: Mapping[str, Any]) -> Method:
        assert self.method is not None
        return make_method(self.method, **{**_without(self.options, TURN), **budget})

    def to_turn(self, decoder_layers: int, seed: int = 0) -> Method:
        """The method object whose knob is to be turned."""
        assert self.method is not None
        options = available_methods()[self.method].options_for_depth(decoder_layers)
        if self.stochastic:
            options["seed"] = seed
        return make_method(self.method, **{**options, **_without(self.options, TURN)})

    def at(self, keep: int | float, decoder_layers: int, seed: int = 0) -> Method:
        """The method object for a budget.

        Raises:
            ValueError: options or budget do not fit.
        """
        assert self.method is not None
        options = available_methods()[self.method].options_for_depth(decoder_layers)
        if self.stochastic:
            options["seed"] = seed
        return make_method(
            self.method, **{**options, **_without(self.options, TURN), "keep": keep}
        )  # fmt: skip


def _slug(value: Any) -> str:
    """Text for file names: readable, and different for different values."""
    text = value if isinstance(value, str) else canonical(value)
    short = re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-")
    if short == text or isinstance(value, (bool, int, float, type(None))):
        return short
    return f"{short[:24]}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


# ------------------------------------------------------------------------------- reading


def parse_variant(spec: Any) -> tuple[str, dict[str, Any]]:
    """Method name and options of ``"todre"``, ``"todre:select=k_center:tau=0.2"``, ``{"name":
    "todre", "select": "k_center"}`` or ``{"todre": {"select": "k_center"}}``.

    Raises:
        ValueError: none of these, an unknown method or option, or an option that is a budget.
    """
    if isinstance(spec, Mapping):
        name, options = _from_mapping(spec)
    elif isinstance(spec, str):
        name, *pairs = split_outside(spec, ":")
        options = {}
        for pair in pairs:
            option, value = parse_option(pair, spec)
            options[option] = value
    else:
        raise ValueError(
            f"method {spec!r} should be a name, name:option=value, or a table with a name"
        )
    name = name.lower()
    if "exact" in options and AS_PUBLISHED not in options:
        warnings.warn(
            f"option 'exact' of {name} is called {AS_PUBLISHED!r} now", FutureWarning, stacklevel=2
        )
        options[AS_PUBLISHED] = options.pop("exact")
    check_variant(name, options)
    return name, options


def _from_mapping(spec: Mapping[Any, Any]) -> tuple[str, dict[str, Any]]:
    options = dict(spec)
    if "name" in options:
        name = options.pop("name")
    elif len(options) == 1:
        ((name, value),) = options.items()
        options = (
            dict(value) if isinstance(value, Mapping) else {} if value is None else {"": value}
        )
    else:
        name = None
    if not isinstance(name, str) or not all(isinstance(o, str) and o for o in options):
        raise ValueError(f"method {dict(spec)!r} should have a name and options")
    return name, {option: as_tuples(value) for option, value in options.items()}


def parse_option(pair: str, where: str) -> tuple[str, Any]:
    """``option=value``; the value is a Python literal, anything else is text.

    Raises:
        ValueError: no ``=``, no name before it, or a budget that is none.
    """
    name, equals, text = pair.partition("=")
    name = name.strip().replace("-", "_")
    if not equals or not name.isidentifier():
        raise ValueError(f"option {pair!r} of {where!r} should be name=value")
    return name, option_value(name, text)


def check_variant(name: str, options: Mapping[str, Any]) -> None:
    """A known method with options that it has and takes.

    Raises:
        ValueError: says what is wrong and what would be right.
    """
    if name in UNPATCHED:
        if options:
            raise ValueError(f"{name!r} is a control and takes no options, got {dict(options)!r}")
        return
    if name == Composed.name:
        _check_composed(options)
        return
    if name not in available_methods():
        known = [*available_methods(), *UNPATCHED]
        hint = did_you_mean(name, known)
        raise ValueError(f"method {name!r} is unknown; known: {', '.join(sorted(known))}.{hint}")
    if AS_PUBLISHED in options:
        if options[AS_PUBLISHED] is not True:
            raise ValueError(
                f"option {AS_PUBLISHED!r} of {name} should be true, is {options[AS_PUBLISHED]!r}"
            )
        whole = _without(options, AS_PUBLISHED)
    elif TURN in options:
        knobs = available_methods()[name].knobs
        if options[TURN] not in knobs:
            raise ValueError(
                f"option {TURN!r} of {name} should be one of {', '.join(map(repr, knobs))}, is "
                f"{options[TURN]!r}"
            )
        whole = _without(options, TURN)
        if options[TURN] == "keep":
            whole = {**whole, "keep": 1}
    else:
        budgets = available_methods()[name].budget_options
        for option in options:
            if option in budgets:
                raise ValueError(
                    f"option {option!r} of {name} is a budget, and a sweep sets budgets with keep"
                )
        whole = {**options, "keep": 1}
    try:
        make_method(name, **whole)
    except TypeError as error:
        raise ValueError(f"method {name} with {dict(options)!r}: {error}") from None


def _check_composed(options: Mapping[str, Any]) -> None:
    """A composition is a whole setting: which of its budgets should meet another is not said.

    Raises:
        ValueError: it is to meet budgets, or cannot be made.
    """
    if options.get(AS_PUBLISHED) is not True:
        raise ValueError(
            f"{Composed.name} has budgets of its own, so it meets none of a sweep; it should have "
            f"{AS_PUBLISHED}=true beside its methods"
        )
    try:
        make_method(Composed.name, **_without(options, AS_PUBLISHED))
    except TypeError as error:
        raise ValueError(f"method {Composed.name}: {error}") from None


def build_variants(
    methods: Sequence[tuple[str, Mapping[str, Any]]],
    with_controls: bool,
    published: bool,
    media: str = "image",
) -> list[Variant]:
    """All variants of a sweep, each once: ``none``, other controls, then the methods as listed.

    Args:
        methods: names with options; empty means every method for images, or for videos.
        with_controls: include :func:`controls`. ``none`` is always included: everything is
            compared with it.
        published: include the published variants of the methods as well.
        media: what the questions are about, "image" or "video".

    Raises:
        ValueError: ``frames`` is wanted for images.
    """
    yardsticks = controls(media)
    every = available_methods() if media == "video" else image_methods()
    wanted = list(methods) or [(name, {}) for name in every if name not in yardsticks]
    if media != "video" and any(name == "frames" for name, _ in wanted):
        raise ValueError("'frames' is a control of videos, and the benchmark asks about images")
    if published:
        wanted += [
            (name, options)
            for name in dict.fromkeys(name for name, _ in wanted)
            if name in available_methods()
            for options in available_methods()[name].variants
        ]
    first: list[tuple[str, Mapping[str, Any]]] = [
        (name, {}) for name in (yardsticks if with_controls else ("none",))
    ]
    variants = [_variant(name, options) for name, options in [*first, *wanted]]
    return list({variant.name: variant for variant in variants}.values())


def _without(options: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {option: value for option, value in options.items() if option != name}


def _variant(name: str, options: Mapping[str, Any]) -> Variant:
    if name in UNPATCHED:
        return Variant(None, True, unpatched=name)
    cls = available_methods().get(name, Composed)
    return Variant(name, cls.control and not options, dict(options))
