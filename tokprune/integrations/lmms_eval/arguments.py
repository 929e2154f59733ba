"""``--model_args``: what is ours, what is the method's, and what the wrapped model class takes."""

from __future__ import annotations

import ast
import difflib
import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokprune.methods.base import Method, available_methods, make_method, option_names
from tokprune.methods.setting import load_setting
from tokprune.models import resolve

CONTROLS = ("blind", "downsample")
#: arguments of the plug-in itself
OWN = ("base", "method", "setting", "setting_sha", "control", "factor")


@dataclass(frozen=True)
class Arguments:
    """``base``: name of the wrapped model as typed, ``base_class``: its class, ``passed``: its own
    arguments; ``method`` None: nothing is compressed; ``control``: "blind", "downsample" (by
    ``factor``) or None."""

    base: str
    base_class: type
    passed: Mapping[str, Any] = field(default_factory=dict)
    method: Method | None = None
    control: str | None = None
    factor: float | None = None

    @property
    def told(self) -> str:
        """What is done, for people."""
        if self.control == "downsample":
            return f"downsample(factor={self.factor:.4g})"
        return self.control or (repr(self.method) if self.method is not None else "unpruned")


def read_arguments(text: str, force_simple: bool = False) -> Arguments:
    """Sort ``--model_args`` and check all but what the wrapped class takes. No weight is read.

    Args:
        text: ``name=value,name=value``. ``base``, ``method``, ``setting``, ``setting_sha``,
            ``control`` and ``factor`` are ours; options of the method go by their names, or as
            ``option.NAME`` where the wrapped class has a parameter of that name; everything else
            (or ``base.NAME``) is passed on.
        force_simple: take the wrapped model's simple class where there is one.

    Raises:
        ValueError, TypeError: says which argument is wrong, and what would be right.
        OSError: the setting cannot be read.
        ImportError: the wrapped class needs a package that is not installed.
    """
    given = _parsed(text)
    base = given.get("base")
    base_class = _base_class(base, force_simple)
    own = {name: given.pop(name, None) for name in OWN}
    method_class = _method_class(own)
    options, passed = _sorted(given, str(base), base_class, method_class)
    if "pretrained" in passed:
        passed["pretrained"] = resolve(str(passed["pretrained"]))  # "mini", which ships with us
    method = _method(own, method_class, options)
    control, factor = _control(own, method)
    return Arguments(str(base), base_class, passed, method, control, factor)


def _parsed(text: str) -> dict[str, Any]:
    from lmms_eval.utils import simple_parse_args_string

    try:
        return dict(simple_parse_args_string(text))
    except ValueError:
        raise ValueError(
            f"model_args {text!r} should be name=value pairs with commas between them"
        ) from None


def _base_class(base: Any, force_simple: bool) -> type:
    from lmms_eval.models import get_model, list_available_models

    if base is None:
        raise ValueError("base is missing: it should name an lmms-eval model, as in base=llava_hf")
    known = [n for n in list_available_models(include_aliases=True) if n != "tokprune"]
    if base not in known:
        near = difflib.get_close_matches(str(base), known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"base={base!r} should be an lmms-eval model: {', '.join(known)}.{hint}")
    found: type = get_model(base, force_simple)
    return found


def parameters(cls: type) -> tuple[dict[str, Any], bool]:
    """Names and defaults of what a class takes, and whether it may take more than these."""
    names: dict[str, Any] = {}
    for part in cls.__mro__:
        if "__init__" not in vars(part):
            continue
        own = list(inspect.signature(vars(part)["__init__"]).parameters.values())[1:]
        for p in own:
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
                names.setdefault(p.name, p.default)
        if not any(p.kind is p.VAR_KEYWORD for p in own):
            return names, False
        if any(p.kind is p.VAR_POSITIONAL for p in own):
            continue  # hands everything to the class above
        return names, True
    return names, True


# ------------------------------------------------------------------------------- method


def _method_class(own: Mapping[str, Any]) -> type[Method] | None:
    name = own["method"]
    if name is not None and own["setting"] is not None:
        raise ValueError("give method or setting, not both: a setting names its method")
    if name is None or name == "none":
        return None
    cls = available_methods().get(str(name).lower())
    if cls is None:
        make_method(str(name))  # says what is known
    return cls


def _sorted(
    given: Mapping[str, Any], base: str, base_class: type, method: type[Method] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of the method, and arguments of the wrapped class."""
    takes, open_ended = parameters(base_class)
    has = [] if method is None else option_names(method)
    options: dict[str, Any] = {}
    passed: dict[str, Any] = {}
    for name, value in given.items():
        prefix, dot, rest = name.partition(".")
        if dot and prefix == "option":
            options[rest] = _option(value)
        elif dot and prefix == "base":
            passed[rest] = value
        elif name in has and name in takes:
            raise ValueError(
                f"{name!r} is an option of {method.name} and a parameter of {base}; "  # type: ignore[union-attr]
                f"write option.{name}=… or base.{name}=… to say which is meant"
            )
        elif name in has:
            options[name] = _option(value)
        elif name in takes:
            passed[name] = value
        else:
            _refuse(name, base, takes, open_ended, has, method)
            passed[name] = value
    if options and method is None:
        raise ValueError(f"option {min(options)!r} belongs to a method, but method is not given")
    return options, passed


def _refuse(
    name: str,
    base: str,
    takes: Mapping[str, Any],
    open_ended: bool,
    has: list[str],
    method: type[Method] | None,
) -> None:
    """Nobody's argument, unless the wrapped class takes any."""
    near = difflib.get_close_matches(name, [*has, *OWN, *takes], n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    if method is None and any(name in option_names(m) for m in available_methods().values()):
        raise ValueError(f"option {name!r} belongs to a method, but method is not given")
    if open_ended and not near:
        return
    with_method = f", to {method.name} (it has: {', '.join(has)})" if method is not None else ""
    raise ValueError(
        f"{name!r} is unknown to tokprune ({', '.join(OWN)}){with_method} and to {base} "
        f"({', '.join(takes)}).{hint}"
        + (f" Write base.{name}=… to pass it on all the same." if open_ended else "")
    )


def _option(value: Any) -> Any:
    """An option as Python means it; lists become tuples, since options are hashable."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            return value
    if isinstance(value, float) and value < 0 and value.is_integer():
        return int(value)  # lmms-eval reads "-1" as -1.0
    return tuple(map(_option, value)) if isinstance(value, list) else value


def _method(
    own: Mapping[str, Any], cls: type[Method] | None, options: Mapping[str, Any]
) -> Method | None:
    if own["setting"] is not None:
        return _setting(str(own["setting"]), own["setting_sha"])
    if own["setting_sha"] is not None:
        raise ValueError("setting_sha is given, but setting is not")
    return None if cls is None else make_method(cls.name, **options)


def _setting(path: str, sha: Any) -> Method | None:
    """The method of a file. Its hash is asked for because the name of a file says nothing about
    its content, and lmms-eval's response cache knows the arguments only."""
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"setting {path}: no such file") from None
    found = hashlib.sha256(content).hexdigest()
    if sha is None:
        raise ValueError(
            f"setting={path} needs setting_sha={found} beside it, so that a response cache can "
            "tell its content from any other"
        )
    if str(sha).lower() != found:
        raise ValueError(f"setting_sha={sha} is not that of setting={path}, which is {found}")
    try:
        value = json.loads(content)
    except ValueError as error:
        raise ValueError(f"setting {path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"setting {path}: should hold a JSON object")
    if value.get("method", "") is None:
        if value.get("options"):
            raise ValueError(f"setting {path}: 'options' are given, but 'method' is null")
        return None
    return load_setting({"schema": 1, **value})


def _control(own: Mapping[str, Any], method: Method | None) -> tuple[str | None, float | None]:
    control, factor = own["control"], own["factor"]
    if control is not None and control not in CONTROLS:
        raise ValueError(f"control={control!r} should be one of {', '.join(CONTROLS)}")
    if control is not None and method is not None:
        raise ValueError(
            f"control={control!r} leaves the model as it is; give either control or a method"
        )
    if control != "downsample":
        if factor is not None:
            raise ValueError("factor is given, but control=downsample is not")
        return control, None
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 1 <= factor < 1e4:
        raise ValueError(f"factor={factor!r} should be a number from 1: by how much sides shrink")
    return control, float(factor)
