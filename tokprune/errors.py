"""Exceptions that tokprune raises. All derive from a built-in, so plain handlers catch them."""

import difflib
from collections.abc import Iterable


class UnsupportedModelError(ValueError):
    """The model, its vision tower, its attention backend or its cache is not one we know.

    No TypeError: transformers 4 takes one that is raised in a decoder for its own, and runs the
    decoder again.
    """


class PromptMismatchError(ValueError):
    """The image placeholders of a prompt do not fit the images that came with it."""


class NonFiniteFeaturesError(ValueError):
    """Image features hold NaN or infinite values, so no ranking of tokens means anything."""


class PictureError(ValueError):
    """An image that a user gave cannot be read; the text begins with the user's name of it."""


class AlreadyPatchedError(RuntimeError):
    """The model carries a patch, or shares its decoder with one that does, and what was asked for
    cannot be done with it: nesting, pickling, a second patch."""


class CompositionError(ValueError):
    """Two methods cannot run together."""


class ContractError(ValueError):
    """A method handed the engine something that it cannot use; names both, and what would do."""


class UnsupportedVideoError(ValueError):
    """The method takes tokens away where the model still needs every frame of a video whole."""


class ChatTemplateError(ValueError):
    """The chat template of a checkpoint fails, or makes a prompt without the images."""


def shorten(value: object, most: int = 80) -> str:
    """The ``repr`` of a value for an error text, its middle left out where it is long."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 20]}…{text[-19:]}"


def did_you_mean(word: object, known: Iterable[str], most: int = 1) -> str:
    """`` Did you mean 'x'?``, for the end of an error text; "" where nothing known is near."""
    near = difflib.get_close_matches(str(word), list(known), n=most)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
