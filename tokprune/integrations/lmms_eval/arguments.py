"""``--model_args``: what is ours, what is the method's, and what the wrapped model class takes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokprune.errors import did_you_mean
from tokprune.eval.sweep.settings import Settings
from tokprune.eval.sweep.trials import Trial
from tokprune.files import parse_json
from tokprune.integrations.lmms_eval.wrapped import Base, base_class, parameters
from tokprune.methods.base import Method
from tokprune.methods.registry import available_methods, make_method, option_names
from tokprune.methods.setting import SCHEMA, load_setting
from tokprune.models import resolve
from tokprune.words import option_value

CONTROLS = ("blind", "downsample")
#: the setting's file in a trial's folder
SETTING = "setting.json"
#: letters that lmms-eval's list of arguments cannot hold
_SPECIAL = frozenset(",\"'[]{}")
#: arguments of the plug-in itself
OURS = ("base", "method", "setting", "setting_sha", "control", "factor")


@dataclass(frozen=True)
class Arguments:
    """What ``--model_args`` says."""

    #: name of the wrapped model as typed, and its class
    base: str
    base_class: type
    #: arguments of that class
    passed: Mapping[str, Any] = field(default_factory=dict)
    #: None: nothing is compressed
    method: Method | None = None
    #: "blind", "downsample" (by ``factor``) or None
    control: str | None = None
    factor: float | None = None

    @property
    def description(self) -> str:
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
    others = _parsed(text)
    ours = {name: others.pop(name, None) for name in OURS}
    base, cls = str(ours["base"]), base_class(ours["base"], force_simple)
    method_class = _method_class(ours)
    options, passed = _sorted(others, base, cls, method_class)
    if "pretrained" in passed:
        passed["pretrained"] = resolve(str(passed["pretrained"]))  # "mini", which ships with us
    method = _method(ours, method_class, options)
    control, factor = _control(ours, method)
    return Arguments(base, cls, passed, method, control, factor)


def _parsed(text: str) -> dict[str, Any]:
    from lmms_eval.utils import simple_parse_args_string

    try:
        return dict(simple_parse_args_string(text))
    except ValueError:
        raise ValueError(
            f"model_args {text!r} should be name=value pairs with commas between them"
        ) from None


# ------------------------------------------------------------------------------- method


def _method_class(ours: Mapping[str, Any]) -> type[Method] | None:
    name = ours["method"]
    if name is not None and ours["setting"] is not None:
        raise ValueError("give method or setting, not both: a setting names its method")
    if name is None or name == "none":
        return None
    cls = available_methods().get(str(name).lower())
    if cls is None:
        make_method(str(name))  # says what is known
    return cls


def _sorted(
    others: Mapping[str, Any], base: str, cls: type, method: type[Method] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of the method, and arguments of the wrapped class."""
    takes, open_ended = parameters(cls)
    has = [] if method is None else option_names(method)
    options: dict[str, Any] = {}
    passed: dict[str, Any] = {}
    for name, value in others.items():
        prefix, dot, rest = name.partition(".")
        if dot and prefix == "option":
            options[rest] = _option(rest, value)
        elif dot and prefix == "base":
            passed[rest] = value
        elif name in has and name in takes:
            raise ValueError(
                f"{name!r} is an option of {method.name} and a parameter of {base}; "  # type: ignore[union-attr]
                f"write option.{name}=… or base.{name}=… to say which is meant"
            )
        elif name in has:
            options[name] = _option(name, value)
        elif name in takes:
            passed[name] = value
        else:
            _refuse(name, base, takes, open_ended, has, method)
            passed[name] = value
    if options and method is None:
        raise ValueError(f"option {min(options)!r} belongs to a method, but method is not given")
    return options, passed


def _refuse(
    name: str, base: str, takes: Mapping[str, Any], open_ended: bool, has: list[str],
    method: type[Method] | None,
) -> None:  # fmt: skip
    """Nobody's argument, unless the wrapped class takes any."""
    hint = did_you_mean(name, [*has, *OURS, *takes])
    if method is None and any(name in option_names(m) for m in available_methods().values()):
        raise ValueError(f"option {name!r} belongs to a method, but method is not given")
    if open_ended and not hint:
        return
    with_method = f", to {method.name} (it has: {', '.join(has)})" if method is not None else ""
    raise ValueError(
        f"{name!r} is unknown to tokprune ({', '.join(OURS)}){with_method} and to {base} "
        f"({', '.join(takes)}).{hint}"
        + (f" Write base.{name}=… to pass it on all the same." if open_ended else "")
    )


def _option(name: str, value: Any) -> Any:
    """An option as Python means it; lists become tuples, since options are hashable."""
    if isinstance(value, str):
        value = option_value(name, value)
    if isinstance(value, float) and value < 0 and value.is_integer():
        return int(value)  # lmms-eval reads "-1" as -1.0
    return tuple(_option(name, one) for one in value) if isinstance(value, list) else value


def _method(
    ours: Mapping[str, Any], cls: type[Method] | None, options: Mapping[str, Any]
) -> Method | None:
    if ours["setting"] is not None:
        return _setting(str(ours["setting"]), ours["setting_sha"])
    if ours["setting_sha"] is not None:
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
        value = parse_json(content)
    except ValueError as error:
        raise ValueError(f"setting {path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"setting {path}: should hold a JSON object")
    if value.get("method", "") is None:
        if value.get("options"):
            raise ValueError(f"setting {path}: 'options' are given, but 'method' is null")
        return None
    return load_setting({"schema": SCHEMA, **value})


def _control(ours: Mapping[str, Any], method: Method | None) -> tuple[str | None, float | None]:
    control, factor = ours["control"], ours["factor"]
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


# ------------------------------------------------------------------------- written by a sweep


def join(args: Mapping[str, Any]) -> str:
    """The text of ``--model_args``.

    Raises:
        ValueError: a value that such a text cannot hold.
    """
    for name, value in args.items():
        text = str(value)
        if _SPECIAL & set(text) or text != text.strip() or not text:
            raise ValueError(
                f"{name}={text!r} cannot be passed to lmms-eval, whose arguments hold no commas, "
                "quotes or brackets"
            )
    return ",".join(f"{name}={value}" for name, value in args.items())


def setting_text(trial: Trial) -> str | None:
    """The JSON file that names the method of a trial; None where the model stays unpatched."""
    if trial.entry["method"] is None:
        return None
    setting = {"schema": SCHEMA, "method": trial.entry["method"], "options": trial.entry["options"]}
    return json.dumps(setting, indent=1, sort_keys=True) + "\n"


def model_arguments(
    settings: Settings, base: Base, trial: Trial, pretrained: str, device: str
) -> str:
    """The text of ``--model_args``. The setting's content is named by its hash, since lmms-eval
    knows a model by this text only.

    Raises:
        ValueError: the model's path holds letters that such a text cannot.
    """
    args: dict[str, Any] = {"base": base.name, "pretrained": pretrained}
    if base.takes("dtype"):
        args["dtype"] = trial.entry["dtype"]
    if device == "cpu" and base.takes("device_map"):
        args["device_map"] = "cpu"
    if settings.trust_remote_code and base.takes("trust_remote_code"):
        args["trust_remote_code"] = True
    args |= settings.model_args
    setting = setting_text(trial)
    if setting is not None:
        args["setting"] = SETTING
        args["setting_sha"] = hashlib.sha256(setting.encode()).hexdigest()
    elif trial.blind:
        args["control"] = "blind"
    elif trial.reduced_input is not None:
        args |= {"control": "downsample", "factor": repr(trial.reduced_input.factor)}
    return join(args)
