"""What an engine is to an export, and what an export is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from tokprune.errors import UnsupportedModelError
from tokprune.methods.base import Method


@dataclass(frozen=True)
class Export:
    """What another engine takes for a setting."""

    #: in the engine's words
    options: dict[str, Any]
    #: command line or Python that hands them over
    how: str
    #: what is not the same there, a sentence each
    nearness: tuple[str, ...]


@dataclass(frozen=True)
class Engine:
    """An engine that has methods of its own."""

    #: for the command line
    name: str
    #: for people
    label: str
    #: method class → function of a method, and of the visual tokens that an image (a video, for
    #: methods of videos) has before it, None where nobody knows
    methods: Mapping[type[Method], Callable[[Any, int | None], Export]]
    #: model classes in which the engine has them
    models: tuple[str, ...]

    def check_model(self, method: Method, architectures: list[str]) -> None:
        """Whether the engine has its methods in a model whose config names these classes.

        Raises:
            UnsupportedModelError: it has not; lists those that it has them in.
        """
        if not set(architectures) & set(self.models):
            raise UnsupportedModelError(
                f"architectures={architectures} is not one in which {self.label} has "
                f"{method.name}; it should be one of {', '.join(self.models)}"
            )

    def export(self, method: Method, tokens: int | None) -> Export:
        """A method in this engine's words.

        Args:
            tokens: of an image, or a video, before the method; None: unknown.

        Raises:
            ValueError: an option has no counterpart there; says which, and what would do.
        """
        if method.rectify is not None:
            no_counterpart(self.label, method, "rectify", "attention takes no bias; leave it out")
        if method.video_unit != "video":
            no_counterpart(self.label, method, "video_unit", "it decides itself; leave it out")
        return self.methods[type(method)](method, tokens)


def no_counterpart(label: str, method: Method, option: str, why: str) -> NoReturn:
    """
    Raises:
        ValueError: always; names the option and its value.
    """
    raise ValueError(
        f"{option}={getattr(method, option)!r} of {method.name} has no counterpart in {label}: "
        f"{why}"
    )
