"""What must hold for a method before it meets a model: options, words, presets."""

from __future__ import annotations

import dataclasses
import inspect
import re

from tokprune.engine.model import ModelFacts, TowerFacts
from tokprune.families import bind
from tokprune.methods import Method, available_methods, make_method
from tokprune.testing.case import Case
from tokprune.testing.report import Fault

#: the models that presets are published for, as they are
_CLIP = TowerFacts(
    encoder_layers=24, feature_layer=22, grid=(24, 24), tokens_per_tile=576, has_cls=True,
    cls_in_features=False,
)  # fmt: skip
_LLAVA = ModelFacts("llava-1.5", decoder_layers=32, max_visual_tokens=576, tower=_CLIP)
_NEXT = dataclasses.replace(
    _LLAVA, family="llava-next", max_visual_tokens=5 * 576 + 24 * 4,
    tower=dataclasses.replace(_CLIP, max_tiles=5, tiled=True),
)  # fmt: skip
PUBLISHED = {
    "llava-1.5": _LLAVA,
    "llava-next": _NEXT,
    "llava-next-video": dataclasses.replace(
        _NEXT, family="llava-next-video", videos=True, frame_grid=(12, 12), max_visual_tokens=4096
    ),
}


def is_declared(method: Method) -> str:
    """A frozen dataclass with a name of its own, in lower case."""
    cls = type(method)
    own = {n for n, kind in inspect.get_annotations(cls).items() if "ClassVar" not in str(kind)}
    if lost := own - {f.name for f in dataclasses.fields(cls)}:
        raise Fault(
            f"{', '.join(sorted(lost))} of {cls.__name__} are no options; it should be decorated "
            "with @dataclass(frozen=True)"
        )
    if not cls.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise Fault(f"{cls.__name__} should be frozen: @dataclass(frozen=True)")
    name = getattr(cls, "name", None)
    if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
        raise Fault(
            f"{cls.__name__}.name={name!r} should be a word in lower case: name: ClassVar[str] = "
            "'my-method'"
        )
    registered = available_methods().get(name)
    if registered is not None and registered is not cls:
        raise Fault(f"name={name!r} is that of {registered.__module__}.{registered.__qualname__}")
    return f"frozen dataclass {cls.__name__}, name {name!r}" + (
        "" if registered else " (not registered: @register_method makes it known by name)"
    )


def is_documented(method: Method) -> str:
    """A docstring of its own, and a word about every option."""
    cls = type(method)
    generated = f"{cls.__name__}{str(inspect.signature(cls)).replace(' -> None', '')}"
    own = inspect.cleandoc(cls.__doc__ or "")
    if not own or own == generated or own.startswith(f"{cls.__name__}("):
        raise Fault(f"{cls.__name__} has no docstring; say what it keeps, and its source")
    text = "\n".join(_words(base) for base in cls.__mro__ if issubclass(base, Method))
    silent = [f.name for f in dataclasses.fields(cls) if f.init and not _names(text, f.name)]
    if silent:
        raise Fault(
            f"nothing is said about option(s) {', '.join(silent)}: name them in the docstring "
            "(Args:), or put a '#:' comment or a docstring at the field"
        )
    return f"docstring, {len(dataclasses.fields(cls))} options documented"


def _words(cls: type) -> str:
    """Docstring, and the fields of the class body that have a comment or docstring of their own."""
    text = cls.__doc__ or ""
    try:
        source = inspect.getsource(cls)
    except (OSError, TypeError):  # made in an interactive session
        return text
    field = r"^ +(\w+) *:[^\n=]+(?:=[^\n]*)?\n +\"\"\""
    commented = r"#:[^\n]*\n(?: +#[^\n]*\n)* +(\w+) *:"
    return "\n".join([text, *re.findall(field, source, re.M), *re.findall(commented, source)])


def _names(text: str, option: str) -> bool:
    return re.search(rf"\b{re.escape(option)}\b", text) is not None


def comes_back(method: Method) -> str:
    """The same options make an equal method with an equal repr, which shows every option."""
    cls = type(method)
    options = {f.name: getattr(method, f.name) for f in dataclasses.fields(cls) if f.init}
    by_name = available_methods().get(cls.name) is cls
    again = make_method(cls.name, **options) if by_name else cls(**options)
    if again != method or repr(again) != repr(method):
        raise Fault(
            f"its own options make another method: {again!r} of {method!r}; __post_init__ should "
            "not change an option, or change it to what it takes itself"
        )
    shared = {f.name for f in dataclasses.fields(cls) if f.kw_only}
    for name, value in options.items():
        if name not in shared and f"{name}={value!r}" not in repr(method):
            raise Fault(f"repr {method!r} does not show {name}={value!r}: it is the configuration")
    try:
        hash(method)
    except TypeError as error:
        raise Fault(
            f"it cannot be hashed ({error}); options should be numbers, words and tuples"
        ) from error
    return repr(method)


def presets_are_valid(method: Method) -> str:
    """Every preset makes a method that plans on the model it is published for."""
    presets = type(method).presets
    for preset in presets:
        where = f"preset ({preset.model!r}, {preset.budget!r})"
        try:
            made = type(method).preset(preset.model, preset.budget)
            if preset.model in PUBLISHED:
                made.plan(PUBLISHED[preset.model])
        except Exception as error:
            raise Fault(f"{where} does not hold: {type(error).__name__}: {error}") from error
        if not preset.source:
            raise Fault(f"{where} names no source")
    return f"{len(presets)} presets" if presets else "no presets"


def refuses_budgets(case: Case) -> str:
    """Budgets that make no sense are refused with a text that names the option."""
    bad = [0, -3, 0.0, 1.5, float("nan"), "64", True]
    if not bind(case.model).facts.videos:  # how long a video is nobody knows beforehand
        bad.append(10**9)
    for value in bad:
        try:
            made = dataclasses.replace(case.method, keep=value)  # type: ignore[call-arg]
            made.plan(bind(case.model).facts)
        except (ValueError, TypeError) as error:
            if "keep" not in str(error):
                raise Fault(
                    f"keep={value!r} is refused without naming the option: {error}"
                ) from error
        except Exception as error:
            raise Fault(
                f"keep={value!r} fails with {type(error).__name__} ({error}); it should be a "
                "ValueError or TypeError that names keep"
            ) from error
        else:
            raise Fault(
                f"keep={value!r} is accepted; it should be refused when the method is made or "
                "planned (the annotation Budget and check_fits of tokprune.methods.base do it)"
            )
    return f"{len(bad)} bad values of keep are refused by name"
