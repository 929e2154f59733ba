"""The method interface: a published recipe as a frozen dataclass of hyper-parameters."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from tokprune.engine.contracts import Plan, Positions, Rectify
from tokprune.engine.model import ImageLayout, ModelFacts, VideoUnit
from tokprune.methods.options import Budget, Renamed, check_options, check_video_unit

M = TypeVar("M", bound="Method")
Source = Literal["official code", "paper's equations", "ours"]


@dataclass(frozen=True)
class Preset:
    """A published setting: ``budget`` visual tokens on ``model``, and the options behind it."""

    model: str
    budget: int | float | str
    options: dict[str, Any]
    source: str


#: visual tokens of an image (all its tiles), and decoder layers, of models with presets
PRESET_MODELS = {"llava-1.5": (576, 32), "llava-next": (2880, 32)}


@dataclass(frozen=True)
class Knob:
    """What :func:`tokprune.calibrate` turns."""

    #: the method at a value
    at: Callable[[Any], Method]
    #: least and largest value, above 0, between which the tokens rise or fall; None: whole numbers
    #: of tokens
    between: tuple[float, float] | None = None
    #: what helps where a number of tokens is out of reach, for people
    hint: str = ""


@dataclass(frozen=True)
class Method(ABC):
    """Base of all methods. Subclasses are frozen dataclasses; ``repr`` is the configuration.

    Options are checked against their annotations when a method is made
    (:mod:`tokprune.methods.options`). What a budget (``keep``) counts is the same for all methods.
    Of a still image it is the whole image, its tiles together, except where a method says that it
    is every tile. Of a video it is what the option ``video_unit`` names, which every method has:

    Args:
        video_unit: what of a video is compressed as one, with the budget and the scores of its own:
            "video" (default), all its frames together; a whole number n, segments of n consecutive
            frames, the last one of those left over; "frame", each frame as if it were an image.
            Still images do not care, and methods that work tile by tile (``pool``, ``m3``) treat
            every frame alike anyway.
        rectify: attention that makes up for what is gone: None (default), "size", "distance",
            "size+distance", or a mapping with the options of
            :class:`~tokprune.engine.contracts.Rectify`.
    """

    #: the word for ``compress`` and the command line, lower case
    name: ClassVar[str]
    #: where it acts, for people
    stages: ClassVar[tuple[str, ...]] = ()
    #: what it reads, for people
    needs: ClassVar[str] = "features"
    #: citation
    paper: ClassVar[str] = ""
    #: what it was written from: official code that golden cases were recorded of, or equations
    source: ClassVar[Source] = "official code"
    #: whether what stays depends on the question; words where an option decides
    reads_prompt: ClassVar[bool | str] = False
    #: what makes the number of tokens depend on the image, "" if nothing does
    adaptive: ClassVar[str] = ""
    #: what stands in for the attention of a class token where the tower has none
    without_class_token: ClassVar[str] = ""
    #: what is done elsewhere where no stage may change rows of the vision encoder
    without_tower_rows: ClassVar[str] = ""
    #: settings by which it does without the vision encoder, to be tried in this order
    without_tower: ClassVar[tuple[Mapping[str, Any], ...]] = ()
    presets: ClassVar[tuple[Preset, ...]] = ()
    #: it has nothing to drop in still images
    videos_only: ClassVar[bool] = False
    #: a yardstick that a sweep sets beside the methods, no method of its own
    control: ClassVar[bool] = False
    #: options that are budgets, which a sweep sets through ``keep``
    budget_options: ClassVar[frozenset[str]] = frozenset({"keep"})
    #: what :func:`tokprune.calibrate` can turn, the usual one first
    knobs: ClassVar[tuple[str, ...]] = ("keep",)
    #: published variants that deserve a line of their own in a sweep, as options
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = ()
    #: values that a search tries, of options whose annotation does not tell (or tells too many);
    #: none: it leaves the option alone (:mod:`tokprune.eval.tune.space`)
    searched: ClassVar[Mapping[str, Sequence[Any]]] = {}
    #: what ``positions=None`` means where positions have one axis: as published
    published_positions: ClassVar[Positions] = "compact"
    #: options by the names that settings of the release before have
    renamed: ClassVar[tuple[Renamed, ...]] = ()

    video_unit: Annotated[VideoUnit, check_video_unit] = field(default="video", kw_only=True)
    rectify: Rectify | None = field(default=None, kw_only=True)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__repr__" not in cls.__dict__:  # before the dataclass decorator makes another
            cls.__repr__ = _configuration  # type: ignore[assignment,method-assign]

    def __post_init__(self) -> None:
        object.__setattr__(self, "rectify", Rectify.of(self.rectify))
        check_options(self)

    @abstractmethod
    def plan(self, facts: ModelFacts) -> Plan:
        """The stages of this method on a model.

        Raises:
            ValueError: an option does not fit the model (names option, value, and what would).
            UnsupportedModelError: the model lacks something the method needs.
        """

    def on(self: M, facts: ModelFacts) -> M:
        """The method on a model: what its options leave open is decided. ``positions=None`` is as
        published where positions have one axis, and "preserve" under M-RoPE, where survivors stand
        on a grid and renumbering them gains next to nothing."""
        if getattr(self, "positions", "") is not None:
            return self
        own = "preserve" if facts.axes > 1 else self.new_positions
        return dataclasses.replace(self, positions=own)  # type: ignore[call-arg]

    @property
    def new_positions(self) -> Positions:
        """The option ``positions``, or as published."""
        return getattr(self, "positions", None) or self.published_positions

    @property
    def stochastic(self) -> bool:
        """Whether the result depends on the option ``seed``."""
        return any(field.name == "seed" for field in dataclasses.fields(self))

    def knob(self, name: str) -> Knob:
        """One of ``knobs``.

        Raises:
            ValueError: the setting at hand has none.
        """
        if all(field.name != name for field in dataclasses.fields(self)):
            raise ValueError(f"{self.name} has no option {name!r} that could be turned")
        return Knob(lambda value: dataclasses.replace(self, **{name: value}))

    def mean_tokens(self, tokens: int, layers: int) -> float | None:
        """Visual tokens on the mean over ``layers`` decoder layers, of a still image that would
        enter with ``tokens``: what budgets of different methods are compared by. None where more
        than that number decides it (the image, its tiles), or the decoder is too short.
        """
        return None

    def fixed_count(self, facts: ModelFacts, layout: ImageLayout) -> int | None:
        """Visual tokens that enter the decoder of a still image with this layout, where the setting
        and the layout alone tell: what engines reserve room for that count tokens before they look
        at the image. None where the image or the question decides, or nothing is known.
        """
        return None

    @classmethod
    def options_for_depth(cls, decoder_layers: int) -> dict[str, Any]:
        """Layer options for a decoder of this depth; {} where the defaults are right.

        Raises:
            ValueError: the decoder is too short for any schedule of the method.
        """
        return {}

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


def preset_mean(cls: type[Method], preset: Preset) -> float | None:
    """Visual tokens on the mean over the decoder layers of the model that a preset is for, which
    often is another number than the budget; None where the setting alone does not tell."""
    known = PRESET_MODELS.get(preset.model)
    return known and cls(**preset.options).mean_tokens(*known)


def _configuration(method: Method) -> str:
    """Class and options; those that are given by name alone, which many methods share, where they
    are not the default."""
    shown = [f for f in dataclasses.fields(method) if f.repr]
    shown.sort(key=lambda f: bool(f.kw_only))
    options = ", ".join(
        f"{f.name}={getattr(method, f.name)!r}"
        for f in shown
        if not f.kw_only or getattr(method, f.name) != f.default
    )
    return f"{type(method).__qualname__}({options})"


# ------------------------------------------------------------------- options and a model


def check_fits(
    keep: Budget | Sequence[Budget], facts: ModelFacts, limit: int | None = None, name: str = "keep"
) -> None:
    """A count, or those of a schedule, must not exceed the tokens an image of this model can have.

    Raises:
        ValueError: names the count and the largest that makes sense.
    """
    limit = facts.max_visual_tokens if limit is None else limit
    for budget in keep if isinstance(keep, Sequence) else (keep,):
        if isinstance(budget, int) and budget > limit:
            raise ValueError(
                f"{name}={budget} is larger than the {limit} visual tokens of an image of this "
                f"model; it should be at most {limit}, or a fraction"
            )


def check_layers_fit(
    layers: int | Sequence[int], facts: ModelFacts, first: int = 0, name: str = "prune_before"
) -> None:
    """Every one of these decoder layers exists.

    Raises:
        ValueError: names the layers and the model's depth.
    """
    depth = facts.decoder_layers
    several = layers if isinstance(layers, Sequence) else (layers,)
    if not all(first <= layer < depth for layer in several):
        raise ValueError(
            f"{name}={layers!r} should lie between {first} and {depth - 1}: layers count from 0, "
            f"and this model has {depth} decoder layers"
        )


def resolve_keep(keep: Budget, tokens: int) -> int:
    """Number of tokens to keep out of ``tokens``: a fraction is floored (at least 1), a count is
    capped where an image has fewer tokens than that."""
    if isinstance(keep, int):
        return min(keep, tokens)
    return min(tokens, max(1, int(keep * tokens)))
