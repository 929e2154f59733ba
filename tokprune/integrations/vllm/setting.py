"""Which method a server runs: what stands under ``tokprune`` in the model's config.

There it comes from ``--hf-overrides``, which reach every process of vLLM::

    {"method": "divprune", "keep": 64}
    {"method": "divprune", "options": {"keep": 64}, "max_keep": 144}
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokprune import __version__
from tokprune.methods.base import Method
from tokprune.methods.options import Budget
from tokprune.methods.setting import SCHEMA, load_setting, plain, setting_of

#: attribute of the config, and key of a request's ``mm_processor_kwargs``
KEY = "tokprune"
OFF = "none"


@dataclass(frozen=True)
class ServedSetting:
    """A method, and the largest ``keep`` that a request may ask for."""

    #: None: switched off
    method: Method | None
    #: None: that of the method
    max_keep: Budget | None = None

    @classmethod
    def of(cls, config: Any) -> ServedSetting:
        """The setting in a model's config.

        Raises:
            ValueError: there is none, or not one that can be used; says what would be right.
        """
        given = getattr(config, KEY, None)
        example = f'{{"{KEY}": {{"method": "divprune", "keep": 64}}}}'
        if given is None:
            raise ValueError(
                f"the model's config says nothing about {KEY!r}; put the setting beside the "
                f"architecture in --hf-overrides, for example {example}"
            )
        return cls.read(given)

    @classmethod
    def read(cls, given: Any) -> ServedSetting:
        """A setting from its JSON, in one of the forms above, or that of ``tokprune recommend``.

        Raises:
            ValueError, TypeError: it cannot be used; says what would be right.
        """
        if not isinstance(given, Mapping) or not isinstance(given.get("method"), str):
            raise ValueError(
                f"{KEY}={given!r} should be an object with the name of a 'method' (or "
                f"{OFF!r}) and its options"
            )
        rest = dict(given)
        most = rest.pop("max_keep", None)
        if "schema" not in rest:
            name = rest.pop("method")
            options = rest.pop("options") if "options" in rest else rest
            if options is not rest and rest:
                raise ValueError(
                    f"{KEY}: {min(rest)!r} stands beside 'options'; it should stand in them"
                )
            rest = {"schema": SCHEMA, "method": name, "options": options}
        if rest["method"] == OFF:
            return cls(None)
        try:
            method = load_setting(rest)
            if most is not None:
                with_keep(method, most)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{KEY}: {str(error).removeprefix('setting: ')}") from None
        return cls(method, most)

    def as_json(self) -> dict[str, Any]:
        """The setting for ``--hf-overrides``: options that are not the method's defaults."""
        if self.method is None:
            return {"method": OFF}
        given = setting_of(self.method)
        del given["schema"]
        return given if self.max_keep is None else {**given, "max_keep": self.max_keep}

    @property
    def digest(self) -> str:
        """Of what decides which tokens an image leaves: all options, and this release."""
        method = self.method
        options = {} if method is None else {
            field.name: plain(getattr(method, field.name)) for field in dataclasses.fields(method)
        }  # fmt: skip
        name = OFF if method is None else method.name
        text = json.dumps([__version__, name, options], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def with_keep(method: Method, keep: Any) -> Method:
    """The method with another budget.

    Raises:
        ValueError, TypeError: it takes none of that name, or not this one.
    """
    fields = {field.name for field in dataclasses.fields(method)}
    if "keep" not in fields or getattr(method, "keep", None) is None:
        raise ValueError(
            f"keep={keep!r} cannot be set for one request: {method!r} says by other options how "
            "much stays"
        )
    return dataclasses.replace(method, keep=keep)  # type: ignore[call-arg]
