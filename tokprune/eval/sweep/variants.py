"""What a sweep compares: methods with options, and the controls that every method must beat."""

from __future__ import annotations

import ast
import difflib
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokprune.eval.sweep.identity import canonical
from tokprune.eval.sweep.reduced_input import SMALLER
from tokprune.methods import Method, available_methods, image_methods, make_method
from tokprune.methods.base import option_names
from tokprune.methods.depth import layer_options

#: in this order; ``none`` is the unpruned model, ``blind`` the same on an empty picture, and
#: ``downsample`` on a smaller one
CONTROLS = ("none", "blind", "random", "grid", "pool", "downsample")
#: controls of videos, beside those: ``frames`` shows fewer of them
VIDEO_CONTROLS = (*CONTROLS, "frames")
#: controls that leave the model as it is
UNPATCHED = ("none", "blind", *SMALLER)
#: controls without a budget
UNBUDGETED = ("none", "blind")
#: options that are budgets of their own, which a sweep sets through ``keep``
_BUDGETS = frozenset({"keep", "level", "r", "ratio", "dominant", "contextual", "window"})
#: set to true among an arm's options: run the method with exactly these, matched to no budget
EXACT = "exact"

#: published variants worth an arm of their own, for ``--variants``
VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "centerclip": ({"algorithm": "spectral"}, {"place": "encoder"}, {"aggregate": "mean"}),
    "cdpruner": ({"relevance": "text"},),
    "dart": ({"pivot_order": "norm"},),
    "fastv": ({"rows": "text"},),
    "flowcut": ({"semantic": "cosine", "value_norm": "per_head"},),
    "pitome": ({"variant": "head"}, {"variant": "paper"}, {"variant": "deit"}),
    "sparsevlm": ({"version": "plus"}, {"recycle": 0.0}),
    "todre": ({"select": "k_center"}, {"stage2": False}),
    "tome": ({"variant": "pitome_baseline"},),
    "transprune": ({"alpha": 1.0}, {"direction": "abs"}),
}


@dataclass(frozen=True)
class Arm:
    """One line of a plot. ``method`` None: an unpatched control; ``options``: those given, beside
    the budget; with ``exact`` among them, all there are (a published setting): a single point."""

    method: str | None
    control: bool
    options: Mapping[str, Any] = field(default_factory=dict)
    #: name of an unpatched control
    unpatched: str = ""

    @property
    def name(self) -> str:
        """Its id, usable in file names: the method and the options given."""
        if self.method is None:
            return self.unpatched
        parts = [f"{name}={_slug(value)}" for name, value in sorted(self.options.items())]
        return "+".join([self.method, *parts])

    @property
    def exact(self) -> bool:
        """Whether the options are the whole setting, budget included."""
        return bool(self.options.get(EXACT))

    def as_given(self) -> Method:
        """The method object of an exact arm.

        Raises:
            ValueError: options do not fit.
        """
        assert self.method is not None
        return make_method(self.method, **_without(self.options, EXACT))

    @property
    def draws(self) -> bool:
        """Whether the answers depend on a seed."""
        if self.exact:
            return False
        if self.method is None or "seed" not in option_names(available_methods()[self.method]):
            return False
        return self.method != "todre" or self.options.get("pivot") == "random"

    def at(self, keep: int | float, decoder_layers: int, seed: int = 0) -> Method:
        """The method object for a budget.

        Raises:
            ValueError: options or budget do not fit.
        """
        assert self.method is not None
        options: dict[str, Any] = dict(layer_options(self.method, decoder_layers))
        if self.draws:
            options["seed"] = seed
        return make_method(self.method, **{**options, **self.options, "keep": keep})


def _slug(value: Any) -> str:
    """Text for file names: readable, and different for different values."""
    text = value if isinstance(value, str) else canonical(value)
    short = re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-")
    if short == text or isinstance(value, (bool, int, float, type(None))):
        return short
    return f"{short[:24]}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


# ------------------------------------------------------------------------------- reading


def parse_arm(spec: Any) -> tuple[str, dict[str, Any]]:
    """Method name and options of ``"todre"``, ``"todre:select=k_center:tau=0.2"``, ``{"name":
    "todre", "select": "k_center"}`` or ``{"todre": {"select": "k_center"}}``.

    Raises:
        ValueError: none of these, an unknown method or option, or an option that is a budget.
    """
    if isinstance(spec, Mapping):
        name, options = _from_mapping(spec)
    elif isinstance(spec, str):
        name, *pairs = [part.strip() for part in spec.split(":")]
        options = {}
        for pair in pairs:
            option, value = parse_option(pair, spec)
            options[option] = value
    else:
        raise ValueError(
            f"method {spec!r} should be a name, name:option=value, or a table with a name"
        )
    name = name.lower()
    check_arm(name, options)
    return name, options


def _from_mapping(spec: Mapping[Any, Any]) -> tuple[str, dict[str, Any]]:
    options = dict(spec)
    if "name" in options:
        name = options.pop("name")
    elif len(options) == 1:
        ((name, own),) = options.items()
        options = dict(own) if isinstance(own, Mapping) else {} if own is None else {"": own}
    else:
        name = None
    if not isinstance(name, str) or not all(isinstance(o, str) and o for o in options):
        raise ValueError(f"method {dict(spec)!r} should have a name and options")
    return name, {o: tuple(v) if isinstance(v, list) else v for o, v in options.items()}


def parse_option(pair: str, where: str) -> tuple[str, Any]:
    """``option=value``; the value is a Python literal, anything else is text.

    Raises:
        ValueError: no ``=``, or no name before it.
    """
    name, equals, text = pair.partition("=")
    name = name.strip().replace("-", "_")
    if not equals or not name.isidentifier():
        raise ValueError(f"option {pair!r} of {where!r} should be name=value")
    try:
        return name, ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        return name, text.strip()


def check_arm(name: str, options: Mapping[str, Any]) -> None:
    """A known method with options that it has and takes.

    Raises:
        ValueError: says what is wrong and what would be right.
    """
    if name in UNPATCHED:
        if options:
            raise ValueError(f"{name!r} is a control and takes no options, got {dict(options)!r}")
        return
    if name not in available_methods():
        known = [*available_methods(), *UNPATCHED]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"method {name!r} is unknown; known: {', '.join(sorted(known))}.{hint}")
    if EXACT in options:
        if options[EXACT] is not True:
            raise ValueError(f"option {EXACT!r} of {name} should be true, is {options[EXACT]!r}")
        given = _without(options, EXACT)
        try:
            make_method(name, **given)
        except TypeError as error:
            raise ValueError(f"method {name} with {given!r}: {error}") from None
        return
    own = option_names(available_methods()[name])
    for option in options:
        if option in _BUDGETS & set(own) and not (name == "mustdrop" and option == "window"):
            raise ValueError(
                f"option {option!r} of {name} is a budget, and a sweep sets budgets with keep"
            )
    try:
        make_method(name, **{**options, "keep": 1})
    except TypeError as error:
        raise ValueError(f"method {name} with {dict(options)!r}: {error}") from None


def build_arms(
    methods: Sequence[tuple[str, Mapping[str, Any]]],
    controls: bool,
    variants: bool,
    media: str = "image",
) -> list[Arm]:
    """All arms of a sweep, each once: ``none``, other controls, then the methods as given.

    Args:
        methods: names with options; empty means every method for pictures, or for videos.
        controls: include ``blind``, ``random``, ``grid``, ``pool``, ``downsample`` and, for videos,
            ``frames``. ``none`` is always included: everything is compared with it.
        variants: include the published variants of the methods as well.
        media: what is asked about, "image" or "video".

    Raises:
        ValueError: ``frames`` is wanted for pictures.
    """
    own = VIDEO_CONTROLS if media == "video" else CONTROLS
    every = available_methods() if media == "video" else image_methods()
    wanted = list(methods) or [(name, {}) for name in every if name not in own]
    if media != "video" and any(name == "frames" for name, _ in wanted):
        raise ValueError("'frames' is a control of videos, and the benchmark asks about pictures")
    if variants:
        wanted += [
            (name, options)
            for name in dict.fromkeys(name for name, _ in wanted)
            for options in VARIANTS.get(name, ())
        ]
    first = list(own) if controls else ["none"]
    arms = [_arm(name, {}) for name in first] + [_arm(name, options) for name, options in wanted]
    return list({arm.name: arm for arm in arms}.values())


def _without(options: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {option: value for option, value in options.items() if option != name}


def _arm(name: str, options: Mapping[str, Any]) -> Arm:
    if name in UNPATCHED:
        return Arm(None, True, unpatched=name)
    return Arm(name, name in VIDEO_CONTROLS and not options, dict(options))
