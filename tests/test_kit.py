"""The author's kit: options checked by their annotations, renamed options, names, score bases."""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

import pytest
import torch
from tiny import BUILDERS, PATCHES, llava, make_inputs
from torch import Tensor

import tokprune
from tokprune.engine.contracts import (
    Attention,
    ImageTokens,
    ModelFacts,
    Plan,
    Rectify,
    SequenceView,
)
from tokprune.methods import (
    DecoderScorer,
    FastV,
    Method,
    PromptScorer,
    PromptSelector,
    available_methods,
    make_method,
    register_method,
    registry,
)
from tokprune.methods.options import (
    AtLeast,
    Budget,
    BudgetSchedule,
    LayerNumbers,
    PruneBefore,
    Range,
    Renamed,
)
from tokprune.methods.setting import load_setting
from tokprune.testing.oracle import (
    assert_same_logits,
    compressed_logits,
    continuation_tokens,
    oracle_logits,
)

# ------------------------------------------------------------------------------- options


@dataclass(frozen=True)
class Options(Method):
    name = "test-options"

    share: Annotated[float, Range(0, 1)] = 0.5
    scale: Annotated[float, Range(0, low_open=True)] = 1.0
    pivots: Annotated[int, AtLeast(2)] = 2
    prune_before: PruneBefore = 2
    late: Annotated[int | tuple[int, ...], LayerNumbers(3)] = (3, 5)
    keep: Budget = 9
    schedule: BudgetSchedule = (5, 0.1)
    heads: Annotated[int, AtLeast(1)] | None = None
    order: Literal["up", "down"] = "up"
    version: Literal[1, None] = 1
    kind: Literal["a"] | None = None
    flag: bool = True
    whole: int = 0
    number: float = 0.0
    text: str = ""
    several: tuple[int, ...] | int | None = None

    def plan(self, facts: ModelFacts) -> Plan:
        return Plan()


GOOD: dict[str, list[Any]] = {
    "share": [0, 1, 0.3],
    "scale": [1e-9, 7, 1e9],
    "pivots": [2, 100],
    "prune_before": [0, 31, (2,), (0, 1, 9), [1, 2]],
    "late": [3, (3, 4)],
    "keep": [1, 5000, 1e-4, 1.0],
    "schedule": [3, 0.5, (7, 3), "checked where the steps are known"],
    "heads": [None, 1],
    "order": ["down"],
    "version": [None],
    "kind": [None, "a"],
    "flag": [False],
    "whole": [-3],
    "number": [-3, 1.5],
    "text": ["any", 3],
    "several": [None, (1,), "no check knows this"],
    "video_unit": ["frame", "video", 3],
    "rectify": [None, Rectify(distance=True)],
}

NAN = float("nan")
BAD: list[tuple[str, Any, type[Exception], str]] = [
    ("share", -0.1, ValueError, r"share=-0.1 should be in \[0, 1\]"),
    ("share", 1.01, ValueError, r"share=1.01 should be in \[0, 1\]"),
    ("share", NAN, ValueError, r"share=nan should be in \[0, 1\]"),
    ("share", "0.5", ValueError, r"share='0.5' should be in \[0, 1\]"),
    ("share", True, ValueError, r"share=True should be in \[0, 1\]"),
    ("share", None, ValueError, r"share=None should be in \[0, 1\]"),
    ("scale", 0, ValueError, r"scale=0 should be in \(0, inf\]"),
    ("scale", math.inf, ValueError, r"scale=inf should be in \(0, inf\]"),
    ("pivots", 1, ValueError, "pivots=1 should be a whole number, at least 2"),
    ("pivots", 2.0, ValueError, "pivots=2.0 should be a whole number, at least 2"),
    ("pivots", True, ValueError, "pivots=True should be a whole number, at least 2"),
    ("prune_before", -1, ValueError, r"prune_before=-1 should be a layer number \(counted from 0"),
    ("prune_before", (), ValueError, r"prune_before=\(\) should be a layer number"),
    ("prune_before", (2, 2), ValueError, r"prune_before=\(2, 2\) .*ascending"),
    ("prune_before", (3, 1), ValueError, r"prune_before=\(3, 1\) .*ascending"),
    ("prune_before", "23", ValueError, r"prune_before='23' should be a layer number"),
    ("prune_before", 2.0, ValueError, r"prune_before=2.0 should be a layer number"),
    ("prune_before", None, ValueError, r"prune_before=None should be a layer number"),
    ("late", (2, 3), ValueError, r"late=\(2, 3\) should be .* from 3 on"),
    ("keep", 0, ValueError, "keep=0 should be at least 1 token"),
    ("keep", 0.0, ValueError, r"keep=0.0 should be a fraction in \(0, 1\]"),
    ("keep", 1.5, ValueError, r"keep=1.5 should be a fraction in \(0, 1\]"),
    ("keep", "9", TypeError, "keep='9' should be a number of tokens"),
    ("keep", None, TypeError, "keep=None should be a number of tokens"),
    ("keep", True, TypeError, "keep=True should be a number of tokens"),
    ("heads", 0, ValueError, "heads=0 should be a whole number, at least 1"),
    ("order", "left", ValueError, "order='left' should be one of 'up', 'down'"),
    ("order", None, ValueError, "order=None should be one of 'up', 'down'"),
    ("version", 2, ValueError, "version=2 should be one of 1, None"),
    ("kind", "b", ValueError, "kind='b' should be one of 'a'"),
    ("flag", "yes", ValueError, "flag='yes' should be one of True, False"),
    ("flag", 2, ValueError, "flag=2 should be one of True, False"),
    ("whole", 1.0, ValueError, "whole=1.0 should be a whole number"),
    ("whole", False, ValueError, "whole=False should be a whole number"),
    ("number", NAN, ValueError, "number=nan should be a finite number"),
    ("number", "1", ValueError, "number='1' should be a finite number"),
    ("number", True, ValueError, "number=True should be a finite number"),
    ("video_unit", 0, ValueError, "video_unit=0 should be 'video', 'frame', or a number"),
    ("video_unit", True, ValueError, "video_unit=True should be 'video', 'frame', or a number"),
]


def test_values_that_fit_their_annotation_pass() -> None:
    assert set(GOOD) == {option.name for option in fields(Options)}
    for name, values in GOOD.items():
        for value in values:
            assert getattr(Options(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "value", "error", "pattern"), BAD, ids=[f"{name}={value}" for name, value, *_ in BAD]
)
def test_values_that_do_not_are_named(
    name: str, value: Any, error: type[Exception], pattern: str
) -> None:
    with pytest.raises(error, match=pattern):
        Options(**{name: value})


def test_a_name_that_cannot_be_resolved_is_not_checked() -> None:
    """An alias of a function, or one for type checkers alone; the other options still are."""
    Local = Literal["a"]

    @dataclass(frozen=True)
    class Inner(Options):
        inner: Local = "b"  # type: ignore[valid-type, assignment]
        outer: Annotated[int, AtLeast(1)] = 1

    assert Inner().inner == "b"
    for name in ("pivots", "outer"):
        with pytest.raises(ValueError, match=f"{name}=0 should be a whole number"):
            Inner(**{name: 0})


def module_of(source: str) -> types.ModuleType:
    """A module of an author's own, as if it had been imported."""
    module = types.ModuleType("someones_methods")
    sys.modules[module.__name__] = module
    exec(source, vars(module))
    return module


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers, and the modules it makes, go with it."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    yield
    sys.modules.pop("someones_methods", None)


SUBCLASS = """
from __future__ import annotations
from dataclasses import dataclass
from typing import Literal
from tokprune.methods import Random

Positions = Literal["elsewhere"]  # another meaning than in the module of the base

@dataclass(frozen=True)
class Mine(Random):
    name = "mine"
    side: Literal["up", "down"] = "up"
"""


@pytest.mark.usefixtures("own_registry")
def test_a_subclass_in_another_module_reads_each_annotation_where_it_stands() -> None:
    made = module_of(SUBCLASS).Mine
    assert made(3, positions="preserve", side="down").side == "down"
    with pytest.raises(ValueError, match="positions='elsewhere' should be one of 'compact'"):
        made(3, positions="elsewhere")
    with pytest.raises(ValueError, match="side='left' should be one of 'up', 'down'"):
        made(3, side="left")
    with pytest.raises(ValueError, match="keep=0 should be at least 1"):
        made(0)


def test_a_check_of_ones_own_runs_after_those_of_the_annotations() -> None:
    @dataclass(frozen=True)
    class Stricter(Options):
        def __post_init__(self) -> None:
            super().__post_init__()
            if self.pivots % 2:
                raise ValueError(f"pivots={self.pivots} should be even")

    assert Stricter(pivots=4).pivots == 4
    with pytest.raises(ValueError, match="should be even"):
        Stricter(pivots=3)
    with pytest.raises(ValueError, match="pivots='3' should be a whole number"):
        Stricter(pivots="3")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------- old names


def test_a_renamed_option_shifts_layer_numbers_and_nothing_else() -> None:
    later = Renamed("after", "prune_before", 1)
    assert later.value(2) == 3
    assert later.value((0, 4)) == later.value([0, 4]) == (1, 5)
    for value in (None, "text", 0.5, True):
        assert later.value(value) is value
    assert Renamed("layer", "prune_before").value([1, 2]) == [1, 2]


# (method, options by their names of before, the same by those of today)
RENAMED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("fastv", {"layer": 3}, {"prune_before": 3}),
    ("dart", {"layer": 3}, {"prune_before": 3}),
    ("pyramiddrop", {"prune_layers": (1, 2, 3)}, {"prune_before": (1, 2, 3)}),
    ("transprune", {"prune_layers": (3, 4, 6)}, {"prune_before": (3, 4, 6)}),
    ("transprune", {"accumulate_layers": (3, 7)}, {"transition_layers": (2, 6)}),
    ("sparsevlm", {"pruning_layers": (0, 4)}, {"prune_before": (1, 5)}),
    ("random", {"per": "frame"}, {"video_unit": "frame"}),
]


@pytest.mark.parametrize(
    ("name", "before", "now"), RENAMED, ids=[f"{n}-{b}" for n, b, _ in RENAMED]
)
def test_options_by_their_old_names(name: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    ((old, value),) = before.items()
    ((new, changed),) = now.items()
    want = make_method(name, keep=0.5, **now)
    text = f"option '{old}' of {name} is called '{new}' now"
    with pytest.warns(FutureWarning, match=text) as caught:
        assert make_method(name, keep=0.5, **before) == want
    assert f"{old}={value!r} is {new}={changed!r}" in str(caught[0].message)
    with pytest.warns(FutureWarning, match=text):
        assert make_method(make_method(name, keep=0.5), **before) == want
    saved = {"schema": 1, "method": name, "options": {"keep": 0.5, **before}}
    with pytest.warns(FutureWarning, match=text):
        assert load_setting(saved) == want
    with pytest.raises(ValueError, match=f"'{new}' of {name} is given twice"):
        with pytest.warns(FutureWarning, match=text):
            make_method(name, keep=0.5, **before, **now)


# (method, saved options, their repr when they were saved)
SAVED: list[tuple[str, dict[str, Any], str]] = [
    ("fastv", {"keep": 9, "layer": 2}, "FastV(keep=9, layer=2, rows='last', positions='preserve')"),
    ("divprune", {"keep": 9}, "DivPrune(keep=9, order='spatial', positions='compact')"),
    (
        "sparsevlm",
        {"keep": [9, 4], "pruning_layers": [0, 4]},
        "SparseVLM(keep=(9, 4), version='v1', pruning_layers=(0, 4), recycle=None)",
    ),
]


@pytest.mark.filterwarnings("ignore:option")
@pytest.mark.parametrize(("name", "options", "text"), SAVED, ids=[name for name, *_ in SAVED])
def test_settings_saved_by_the_release_before(
    name: str, options: dict[str, Any], text: str
) -> None:
    """Their repr has options by other names, and in another order: it decides nothing."""
    saved = {"schema": 1, "method": name, "options": options, "repr": text}
    loaded: Any = load_setting(saved)
    assert loaded.keep == (9 if options["keep"] == 9 else (9, 4))
    with pytest.raises(ValueError, match="remove 'repr'"):
        load_setting({**saved, "schema": 2})


@pytest.mark.parametrize("name", available_methods())
def test_old_names_lead_to_options_that_there_are(name: str) -> None:
    cls = available_methods()[name]
    options = {option.name for option in fields(cls)}
    assert {renamed.name for renamed in cls.renamed} <= options
    assert not {renamed.old for renamed in cls.renamed} & options


# ------------------------------------------------------------------------------- registry


@pytest.mark.usefixtures("own_registry")
def test_a_method_is_known_by_its_name() -> None:
    register_method(Options)
    assert make_method("Test-Options", pivots=5) == Options(pivots=5)
    assert "test-options" in available_methods()


@pytest.mark.parametrize("bad", ["Mine", "my:method", "", None, 3])
@pytest.mark.usefixtures("own_registry")
def test_names_are_words_in_lower_case(bad: Any) -> None:
    cls = type("Mine", (Options,), {"name": bad})
    with pytest.raises(ValueError, match=r"name=.* of .*Mine should be a word.*example 'mine'"):
        register_method(cls)
    assert cls not in available_methods().values()


@pytest.mark.usefixtures("own_registry")
def test_a_taken_name_says_by_whom() -> None:
    cls = type("Mine", (Options,), {"name": "random"})
    with pytest.raises(ValueError, match=r"name='random' of .*Mine is taken by tokprune.*\.Random"):
        register_method(cls)
    assert available_methods()["random"] is tokprune.Random


@pytest.mark.usefixtures("own_registry")
def test_a_notebook_cell_may_run_again() -> None:
    first, second = (register_method(module_of(SUBCLASS).Mine) for _ in range(2))
    assert first is not second
    assert available_methods()["mine"] is second


def test_only_methods_are_registered() -> None:
    for thing in (object, 3, Options()):
        with pytest.raises(TypeError, match="should be a class derived from"):
            register_method(thing)  # type: ignore[type-var, arg-type]


@pytest.mark.usefixtures("own_registry")
def test_a_package_that_brings_a_taken_name_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = type("Theirs", (Options,), {"name": "random"})
    free = type("Ours", (Options,), {"name": "ours"})
    found = [("theirs", taken, "pack"), ("ours", free, "pack")]
    monkeypatch.setattr(registry, "plugins", lambda kind: found)
    registry._load_plugins.cache_clear()
    try:
        with pytest.warns(UserWarning, match="method 'theirs' of package 'pack': .* is taken by"):
            known = available_methods()
    finally:
        registry._load_plugins.cache_clear()
    assert known["random"] is tokprune.Random
    assert known["ours"] is free


# ------------------------------------------------------------------------------- score bases


@dataclass(frozen=True)
class LargestNorm(PromptScorer):
    name = "test-largest-norm"

    def score(self, image: ImageTokens) -> Tensor:
        return image.features.norm(dim=-1)


@dataclass(frozen=True)
class FromTheEnd(PromptSelector):
    name = "test-from-the-end"

    def select(self, image: ImageTokens, keep: int) -> Tensor:
        return image.patch_rows().flip(0)[:keep]


@dataclass(frozen=True)
class Reversed(FromTheEnd):
    name = "test-reversed"
    prompt_order = False  # type: ignore[assignment]


@dataclass(frozen=True)
class LastToken(DecoderScorer):
    name = "test-last-token"

    def score(self, attention: Attention, sequence: SequenceView) -> Tensor:
        return attention.rows(sequence.last_row()).mean((1, 2))


@dataclass(frozen=True)
class LayerAhead(LastToken):
    name = "test-layer-ahead"
    attention_of = "next layer"


@dataclass(frozen=True)
class Together(LastToken):
    name = "test-together"
    ranked_together = True  # type: ignore[assignment]


#: three rows of different length, padded at the left, with two, one and two images
PROMPTS = [[4, "image", 2, "image", 6], [7, "image", 9], [2, "image", 3, "image", 1]]
SIZES = [(20, 40), (40, 20), (30, 22), (10, 72), (14, 40)]

#: toys, and the tokens that are left of an image of n tokens, p of them patches
TOYS: dict[str, tuple[Method, Any]] = {
    "largest norm": (LargestNorm(9), lambda n, p: 9),
    "largest norm, fraction": (LargestNorm(0.3, positions="preserve"), lambda n, p: int(0.3 * p)),
    "from the end": (FromTheEnd(11), lambda n, p: 11),
    "reversed": (Reversed(8), lambda n, p: 8),
    "last token": (LastToken(7), lambda n, p: 7),
    "last token, compact": (LastToken(0.2, 3, "compact"), lambda n, p: int(0.2 * n)),
    "last token, steps": (LastToken(5, (2, 4, 6)), lambda n, p: 5),
    "last token, schedule": (LastToken((20, 0.3, 4), (1, 2, 7)), lambda n, p: 4),
    "layer ahead": (LayerAhead(6, 3), lambda n, p: 6),
    "layer ahead, steps": (LayerAhead(0.125, (1, 3, 5), "compact"), lambda n, p: n // 8),
    "layer ahead, first": (LayerAhead(10, 0), lambda n, p: 10),
    "together": (Together(7, (3, 5)), None),
}


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {family: build() for family, build in BUILDERS.items()}


@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize("case", TOYS)
def test_toys_equal_the_masked_oracle(models: dict[str, Any], case: str, family: str) -> None:
    model, (method, left) = models[family], TOYS[case]
    inputs = make_inputs(model, PROMPTS, SIZES)
    continuation = continuation_tokens(len(PROMPTS), 4)
    with tokprune.compress(model, method) as trace:
        got = compressed_logits(model, inputs, continuation)
    last: Any = trace.last
    images = iter(last.images)
    whole = [[next(images) for _ in row] for row in last.layers[-1].counts]
    if left is None:
        assert [sum(row) for row in last.layers[-1].counts] == [7 * len(row) for row in whole]
        assert any(n != 7 for row in last.layers[-1].counts for n in row)
    else:
        tokens = [[i.record.layout.packed for i in row] for row in whole]  # −1: a newline
        assert last.layers[-1].counts == [
            [left(len(packed), int((packed >= 0).sum())) for packed in row] for row in tokens
        ]
    assert_same_logits(got, oracle_logits(model, inputs, last, continuation))


def image_of(norms: list[float], newline: int | None = None) -> ImageTokens:
    """An image whose tokens have these norms, one of them perhaps a newline."""
    n = len(norms)
    row = torch.arange(n)
    if newline is not None:
        row[newline] = -1
    return ImageTokens(
        features=torch.tensor(norms)[:, None] * torch.tensor([0.6, 0.8]), tile=row.clamp(max=0),
        row=row, col=row.clamp(max=0), column=torch.arange(n), newline=row < 0,
        patches=n - (newline is not None), tiles=1, grid=(n, 1), original=n,
    )  # fmt: skip


def facts(model: Any = None) -> ModelFacts:
    from tokprune.families import family_of

    model = llava() if model is None else model
    family = family_of(model)
    return family.facts(model, family.parts(model))


def chosen(method: PromptSelector, *images: ImageTokens) -> list[list[int] | None]:
    (stage,) = method.plan(facts()).prompt
    answers = stage.select(images)
    return [None if answer is None else answer.index.tolist() for answer in answers]


def test_the_highest_scores_stay_in_prompt_order_and_ties_go_to_the_earlier() -> None:
    image = image_of([1, 5, 3, 5, 3, 3])
    assert chosen(LargestNorm(3), image) == [[1, 2, 3]]
    assert chosen(LargestNorm(4), image) == [[1, 2, 3, 4]]
    assert chosen(Reversed(3), image) == [[5, 4, 3]]
    assert chosen(FromTheEnd(3), image) == [[3, 4, 5]]


def test_newlines_are_candidates_only_where_a_method_says_so() -> None:
    image = image_of([1, 2, 9, 3], newline=2)
    assert chosen(LargestNorm(2), image) == [[1, 3]]
    assert chosen(LargestNorm(3), image) == [None], "as many as there are patches"
    assert chosen(LargestNorm(0.7), image) == [[1, 3]]
    with_newlines = type("WithNewlines", (LargestNorm,), {"newlines": True})
    assert chosen(with_newlines(2), image) == [[2, 3]]
    assert chosen(with_newlines(3), image) == [[1, 2, 3]]


def test_images_with_equally_many_candidates_are_selected_together() -> None:
    seen: list[list[int]] = []

    class Watching(LargestNorm):
        def select_alike(self, images: Any, keep: int) -> Any:
            seen.append([image.count for image in images])
            return super().select_alike(images, keep)

    images = [image_of([1, 2, 3]), image_of([4, 1, 2, 3, 0]), image_of([3, 1, 2]), image_of([7])]
    assert chosen(Watching(2), *images) == [[1, 2], [0, 3], [0, 2], None]
    assert seen == [[3, 3], [5]]


@dataclass(frozen=True)
class Never(DecoderScorer):
    name = "test-never"

    def score(self, attention: Attention, sequence: SequenceView) -> Tensor:
        raise AssertionError("a score was asked for")


@dataclass(frozen=True)
class NeverAhead(Never):
    name = "test-never-ahead"
    attention_of = "next layer"


@pytest.mark.parametrize("method", [Never(1.0, (2, 5)), NeverAhead(PATCHES, 0)], ids=str)
def test_nothing_is_scored_where_nothing_goes(models: dict[str, Any], method: Method) -> None:
    model = models["llava"]
    inputs = make_inputs(model, PROMPTS)
    with torch.no_grad():
        want = model(**inputs).logits
        with tokprune.compress(model, method):
            assert torch.equal(model(**inputs).logits, want)


ERRORS: list[tuple[Any, str]] = [
    (lambda: LargestNorm(37), "keep=37 is larger than the 36 visual tokens"),
    (lambda: LastToken(7, 0), "prune_before=0 should lie between 1 and 7: layers count from 0"),
    (lambda: LastToken(7, (2, 8)), r"prune_before=\(2, 8\) should lie between 1 and 7"),
    (lambda: LayerAhead(7, 8), "prune_before=8 should lie between 0 and 7"),
    (lambda: LastToken((40, 9), (2, 4)), "keep=40 is larger than the 36 visual tokens"),
    (lambda: LastToken((9, 4)), "one budget per layer of prune_before, 1 in all"),
    (lambda: LastToken((4, 9), (2, 4)), "should not rise from one step to the next"),
    (lambda: LastToken((9, 0), (2, 4)), r"keep\[1\]=0 should be at least 1 token"),
    (lambda: LastToken(7, positions="new"), "positions='new' should be one of 'compact'"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("make", "pattern"), ERRORS, ids=[pattern for _, pattern in ERRORS])
def test_bad_options_of_a_toy(models: dict[str, Any], make: Any, pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        tokprune.patch(models["llava"], make())
    assert not tokprune.is_patched(models["llava"])


def test_repr_is_the_configuration() -> None:
    assert repr(LastToken(7, video_unit=2)) == (
        "LastToken(keep=7, prune_before=2, positions=None, video_unit=2)"
    )
    assert repr(LargestNorm(0.5)) == "LargestNorm(keep=0.5, positions=None)"


def test_methods_draw_where_they_have_a_seed() -> None:
    @dataclass(frozen=True)
    class Drawing(LargestNorm):
        seed: int = field(default=0)

    assert Drawing(3).stochastic
    assert not LargestNorm(3).stochastic
    assert not FastV(3).stochastic
