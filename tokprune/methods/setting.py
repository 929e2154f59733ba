"""Settings: a method with its options as JSON, as ``tokprune recommend`` and ``tokprune tune``
write them. Methods at work together are one of ``compose``, with ``{"methods": [{"method": …,
"options": …}, …]}`` as options."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from tokprune.files import read_object
from tokprune.methods.base import Method
from tokprune.methods.composed import Composed
from tokprune.methods.registry import make_method

#: 1, of the release before, is read as well: its option names are mapped, its ``repr`` is ignored
SCHEMA = 2


def load_setting(setting: str | Path | Mapping[str, Any]) -> Method:
    """A method from the JSON of ``tokprune recommend`` or ``tokprune tune``: a file, or the object
    itself.

    Lists become tuples, since JSON has none, unless only a list will do; where the setting also
    holds the method's ``repr``, that decides.

    Raises:
        OSError: the file cannot be read.
        ValueError: not a setting, or one with an unknown method or option; says which.
        TypeError: an option of the wrong type.
    """
    where, value = _read(setting)
    if value.get("schema") not in (1, SCHEMA):
        raise ValueError(
            f"{where}: schema={value.get('schema')!r} is unknown; known: {SCHEMA}. It should be a "
            "file made by 'tokprune recommend'"
        )
    name, options = value.get("method"), value.get("options")
    if not isinstance(name, str):
        raise ValueError(f"{where}: 'method'={name!r} should be the name of a method")
    if not isinstance(options, Mapping):
        raise ValueError(f"{where}: 'options'={options!r} should be a JSON object")
    text = value.get("repr") if value["schema"] == SCHEMA else None
    problems: list[Exception] = []
    made: list[Method] = []
    for form in (as_tuples(options), dict(options)):
        try:
            made.append(make_method(name, **form))
        except (ValueError, TypeError) as error:
            problems.append(error)
            continue
        if text is None or repr(made[-1]) == text:
            return made[-1]
    if not made:
        raise type(problems[0])(f"{where}: {problems[0]}")
    raise ValueError(
        f"{where}: 'options' make {made[0]!r}, but 'repr' is {text}; remove 'repr' to use options "
        "that were changed by hand"
    )


def setting_of(method: Method) -> dict[str, Any]:
    """A method as a setting: the options that are not its defaults; of a composition its methods,
    each likewise."""
    return {"schema": SCHEMA, **_table(method)}


def _table(method: Method) -> dict[str, Any]:
    if isinstance(method, Composed):
        options: dict[str, Any] = {"methods": [_table(part) for part in method.methods]}
    else:
        options = {
            field.name: plain(getattr(method, field.name))
            for field in dataclasses.fields(method)
            if getattr(method, field.name) != field.default
        }
    return {"method": method.name, "options": options}


def method_of(setting: str | PathLike[str] | Mapping[str, Any] | Method, **options: Any) -> Method:
    """A method from any form of it.

    Args:
        setting: file of ``tokprune recommend``, what is in one, the name of a method with its
            ``options``, or a method.

    Raises:
        OSError: the file cannot be read.
        ValueError, TypeError: a bad setting, or options beside one that has its own.
    """
    named = isinstance(setting, str) and not (setting.endswith(".json") or Path(setting).is_file())
    if named or isinstance(setting, Method):
        return make_method(setting, **options)  # type: ignore[arg-type]
    if options:
        raise ValueError(f"options={options!r} stand beside a setting, which has its own")
    return load_setting(setting if isinstance(setting, Mapping) else fspath(setting))  # type: ignore[arg-type]


def save_setting(setting: Mapping[str, Any], path: str | Path) -> None:
    """Write a setting as JSON."""
    Path(path).write_text(json.dumps(setting, indent=1) + "\n", encoding="utf-8")


def _read(setting: str | Path | Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    if isinstance(setting, Mapping):
        return "setting", setting
    path = Path(setting)
    if not path.is_file():
        raise FileNotFoundError(f"setting {path}: no such file")
    return f"setting {path}", read_object(path, "setting")


def as_tuples(value: Any) -> Any:
    """JSON's lists as tuples, inside tables as well: methods take tuples."""
    if isinstance(value, Mapping):
        return {name: as_tuples(item) for name, item in value.items()}
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value


def plain(value: Any) -> Any:
    """The value of an option as JSON has it."""
    if isinstance(value, Method):
        return _table(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
