"""Mistakes of a method's author: every one is an error that names the method, its stage, the value
and what would be right; and the model is as before afterwards."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from tiny import llava, make_inputs
from torch import Tensor

import tokprune
from tokprune.engine.check import set_validation
from tokprune.engine.contracts import (
    CachePolicy,
    DecoderRun,
    DecoderStage,
    EncoderOutcome,
    EncoderRun,
    EncoderStage,
    ImageTokens,
    KeepDecision,
    ModelFacts,
    Plan,
    PromptStage,
    Reduction,
    Selection,
)
from tokprune.errors import ContractError
from tokprune.methods import Method
from tokprune.testing.checks.leftovers import fingerprint

#: two prompts with two images and one, 36 tokens each; the second is padded on the left
PROMPTS = [[4, "image", 6, "image", 2], [7, "image", 9]]
CUT = 3  # layer before which the decoder stages work


@dataclass(frozen=True)
class Flawed(Method):
    """A method whose plan is whatever ``make`` returns."""

    name: ClassVar[str] = "flawed"
    make: Callable[[ModelFacts], Any] = field(repr=False, default=lambda facts: Plan())

    def plan(self, facts: ModelFacts) -> Plan:
        return self.make(facts)  # type: ignore[no-any-return]


class Input(PromptStage):
    def __init__(self, answer: Callable[[Sequence[ImageTokens]], Any], **changes: Any) -> None:
        self.select = answer  # type: ignore[method-assign]
        self.__dict__.update(changes)

    def select(self, images: Sequence[ImageTokens]) -> list[Selection | None]:
        raise AssertionError


class Tower(EncoderStage, EncoderRun):
    """Stage and run in one; ``answer``: of :meth:`after`, ``last``: of :meth:`finish`."""

    after_layers = frozenset({2})

    def __init__(self, answer: Any = None, last: Any = None, **changes: Any) -> None:
        self.answer, self.last = answer, last
        self.__dict__.update(changes)

    def start(self, tower: Any) -> Any:
        return self

    def after(self, layer: int, hidden: Tensor, tokens: Any) -> Any:
        return self.answer and self.answer(hidden, tokens)

    def bias(self, layer: int, tokens: Any) -> Any:
        return torch.zeros(tokens.rows)

    def finish(self, tokens: Any) -> Any:
        return self.last(tokens) if self.last else EncoderOutcome()


class Decoder(DecoderStage, DecoderRun):
    """Stage and run in one; ``answer``: of :meth:`before_layer`, ``cache``: of the end."""

    prune_before = frozenset({CUT})

    def __init__(self, answer: Any = None, cache: Any = None, **changes: Any) -> None:
        self.answer, self.cache = answer, cache
        self.has_cache_policy = cache is not None
        self.__dict__.update(changes)

    def start(self) -> Any:
        return self

    def before_layer(self, layer: int, hidden: Tensor, sequence: Any, scoring: Any) -> Any:
        return self.answer and self.answer(hidden, sequence)

    def after_prefill(self, sequences: Any) -> Any:
        return self.cache(sequences)


def one(answer: Callable[[ImageTokens], Any]) -> Callable[[ModelFacts], Plan]:
    """A prompt stage that answers so for every image."""
    return lambda facts: Plan(prompt=(Input(lambda images: [answer(i) for i in images]),))


def chosen(index: Any, features: Any = None, group: Any = None) -> Callable[[ModelFacts], Plan]:
    return one(lambda image: Selection(index, features, group))


def decoder(answer: Any = None, cache: Any = None, **changes: Any) -> Callable[[Any], Plan]:
    return lambda facts: Plan(decoder=(Decoder(answer, cache, **changes),))


def keep(**changes: Any) -> Callable[[ModelFacts], Plan]:
    """A correct decision (the first five tokens of every image), but for ``changes``: values, or
    functions of (hidden, sequence)."""

    def answer(hidden: Tensor, sequence: Any) -> KeepDecision:
        made = {
            name: value(hidden, sequence) if callable(value) else value
            for name, value in changes.items()
        }
        return KeepDecision(**{"mask": five(hidden, sequence), "counts": [[5, 5], [5]], **made})

    return decoder(answer)


def five(hidden: Tensor, sequence: Any) -> Tensor:
    mask = torch.zeros_like(sequence.visual)
    for image in range(sequence.segments):
        mine = sequence.segment == image
        mask |= mine & (mine.long().cumsum(1) <= 5)
    return mask


def tower(answer: Any = None, last: Any = None, **changes: Any) -> Callable[[ModelFacts], Plan]:
    return lambda facts: Plan(encoder=(Tower(answer, last, **changes),))


def rows_of(hidden: Tensor, rows: Sequence[int]) -> Tensor:
    return torch.tensor(rows).expand(hidden.shape[0], -1)


def reduce(rows: Sequence[int], **changes: Any) -> Callable[[ModelFacts], Plan]:
    def answer(hidden: Tensor, tokens: Any) -> Reduction:
        made = {n: v(hidden, tokens) if callable(v) else v for n, v in changes.items()}
        return Reduction(rows_of(hidden, rows), **made)

    return tower(answer)


def cached(index: Callable[[Any], Any], **changes: Any) -> Callable[[ModelFacts], Plan]:
    """The last layer's entries that ``index`` says stay."""
    return decoder(cache=lambda seen: CachePolicy({7: index(seen[7])}, **changes))


def nan_like(hidden: Tensor, *_: Any) -> Tensor:
    return torch.full_like(hidden, float("nan"))


def with_input_nan(image: ImageTokens) -> Selection:
    features = image.features[:4].clone()
    features[2] = float("nan")
    return Selection(torch.arange(4), features)


@dataclass(frozen=True)
class Mistake:
    plan: Callable[[ModelFacts], Any]
    #: patterns in the order of the text: stage, value, what would be right
    words: tuple[str, ...]
    #: found by a look at values, under validation only
    values: bool = False


LONG = r"should be a torch.int64 tensor of shape"
SELECT = r"prompt stage Input.select\(\)"
BEFORE = r"Decoder.before_layer\(\) of decoder layer 3"
AFTER = r"Tower.after\(\) of encoder layer 2"
CACHE = r"Decoder.after_prefill\(\)"
arange = torch.arange

MISTAKES = {
    # plans
    "a stage is no plan": Mistake(
        lambda f: Input(list), (r"plan\(\)", "answer is <.*Input object", "a Plan")
    ),
    "a list is no plan": Mistake(lambda f: [], (r"plan\(\)", r"answer is \[\]", "a Plan")),
    "nothing is no plan": Mistake(lambda f: None, (r"plan\(\)", "answer is None", "a Plan")),
    "slot without a tuple": Mistake(
        lambda f: Plan(decoder=Decoder()), ("Plan.decoder", "Decoder", "tuple of DecoderStage")
    ),
    "stage in another slot": Mistake(
        lambda f: Plan(prompt=(Decoder(),)), ("Plan.prompt", "Decoder", "a PromptStage")
    ),
    "class of a stage": Mistake(
        lambda f: Plan(prompt=(Input,)), ("Plan.prompt", "class Input itself", "a PromptStage")
    ),
    "cut before no layer": Mistake(
        decoder(prune_before=frozenset({8})),
        ("decoder stage Decoder", "prune_before names layer 8", "0 to 7"),
    ),
    "tap of no layer": Mistake(
        decoder(taps=frozenset({1, -1})), ("stage Decoder", "taps names layer -1", "0 to 7")
    ),
    "transition of no layer": Mistake(
        decoder(transition_layers=frozenset({40})),
        ("stage Decoder", "transition_layers names layer 40", "0 to 7"),
    ),
    "layers as a number": Mistake(
        decoder(taps=3), ("stage Decoder", "taps is 3", "a frozenset of decoder layer numbers")
    ),
    "encoder tap of no layer": Mistake(
        tower(taps=frozenset({6})), ("encoder stage Tower", "taps names layer 6", "0 to 5")
    ),
    "encoder cut after the features": Mistake(
        tower(after_layers=frozenset({5})), ("stage Tower", "after_layers names layer 5", "0 to 4")
    ),
    "features of another layer": Mistake(
        tower(after_tower=3), ("stage Tower", "after_tower is 3", "4, the layer that the model")
    ),
    "word of a prompt stage": Mistake(
        lambda f: Plan(prompt=(Input(list, positions="kept"),)),
        ("prompt stage Input", "positions is 'kept'", "'compact' or 'preserve'"),
    ),
    "word of an encoder stage": Mistake(
        tower(order="raster"), ("stage Tower", "order is 'raster'", "'published' or 'spatial'")
    ),
    "start without a run": Mistake(
        decoder(start=lambda: None), (r"Decoder.start\(\)", "is None", "a DecoderRun")
    ),
    # selections
    "one selection too few": Mistake(
        lambda f: Plan(prompt=(Input(lambda images: [None] * (len(images) - 1)),)),
        (SELECT, "has 2 entries", "a list of 3: one Selection or None per image"),
    ),
    "one selection too many": Mistake(
        lambda f: Plan(prompt=(Input(lambda images: [None] * 4),)),
        (SELECT, "has 4 entries", "a list of 3"),
    ),
    "no list of selections": Mistake(
        lambda f: Plan(prompt=(Input(lambda images: Selection(arange(3))),)),
        (SELECT, "answer is .*Selection", "a list of one Selection or None per image"),
    ),
    "bare tensor": Mistake(
        one(lambda image: arange(5)),
        (SELECT, "image 0", r"a torch.int64 tensor of shape \(5,\)", "a Selection"),
    ),
    "mask as index": Mistake(
        one(lambda image: Selection(image.row > 2)),
        (SELECT, "Selection.index", "torch.bool", LONG, r"nonzero\(\)"),
    ),
    "float index": Mistake(
        chosen(torch.ones(5)), (SELECT, "Selection.index", "torch.float32", LONG + r" \[k\]")
    ),
    "index in a column": Mistake(
        chosen(arange(5)[:, None]), (SELECT, "Selection.index", r"\(5, 1\)", LONG + r" \[k\]")
    ),
    "index that is a list": Mistake(
        chosen([1, 2]), (SELECT, "Selection.index", r"\[1, 2\]", LONG + r" \[k\]")
    ),
    "index twice": Mistake(
        chosen(torch.tensor([3, 9, 3])),
        (SELECT, "Selection.index", r"repeats \[3\]", "unique"),
        True,
    ),
    "index too large": Mistake(
        chosen(arange(30, 37)), (SELECT, "Selection.index", "from 30 to 36", "in 0 to 35"), True
    ),
    "negative index": Mistake(
        chosen(arange(-1, 3)), (SELECT, "Selection.index", "from -1 to 2", "in 0 to 35"), True
    ),
    "more features than rows": Mistake(
        one(lambda image: Selection(arange(5), image.features[:6])),
        (SELECT, "Selection.features", r"\(6, 32\)", r"\[5, 32\]"),
    ),
    "fewer features than rows": Mistake(
        one(lambda image: Selection(arange(5), image.features[:4])),
        (SELECT, "Selection.features", r"\(4, 32\)", r"\[5, 32\]"),
    ),
    "narrow features": Mistake(
        one(lambda image: Selection(arange(5), image.features[:5, :8])),
        (SELECT, "Selection.features", r"\(5, 8\)", r"\[5, 32\]"),
    ),
    "features with NaN": Mistake(
        one(with_input_nan), (SELECT, "Selection.features", "NaN", "finite"), True
    ),
    "group of the kept": Mistake(
        chosen(arange(5), None, arange(5)), (SELECT, "Selection.group", r"\(5,\)", r"\[36\]")
    ),
    "group outside the kept": Mistake(
        chosen(arange(5), None, arange(36)),
        (SELECT, "Selection.group", "0 to 35", "in -1 to 4"),
        True,
    ),
    # decisions inside the decoder
    "bare mask": Mistake(
        decoder(five),
        (BEFORE, r"answer is a torch.bool tensor of shape \(2, 84\)", "a KeepDecision"),
    ),
    "mask of one row": Mistake(
        keep(mask=lambda h, s: five(h, s)[0]),
        (BEFORE, "KeepDecision.mask", r"\(84,\)", r"torch.bool tensor of shape \[2, 84\]"),
    ),
    "mask of visual tokens alone": Mistake(
        keep(mask=lambda h, s: five(h, s)[:, :36]),
        (BEFORE, "KeepDecision.mask", r"\(2, 36\)", r"\[2, 84\]"),
    ),
    "mask of numbers": Mistake(
        keep(mask=lambda h, s: five(h, s).long()),
        (BEFORE, "KeepDecision.mask", "torch.int64", "a torch.bool tensor"),
    ),
    "counts that are not the mask's": Mistake(
        keep(mask=lambda h, s: torch.zeros_like(s.visual)),
        (BEFORE, r"KeepDecision.counts\[0\] is \[5, 5\]", r"\[0, 0\], the number of True"),
        True,
    ),
    "counts of one image exchanged": Mistake(
        keep(counts=[[4, 6], [5]]),
        (BEFORE, r"KeepDecision.counts\[0\] is \[4, 6\]", r"\[5, 5\], the number of True"),
        True,
    ),
    "counts too few rows": Mistake(
        keep(counts=[[5, 5]]), (BEFORE, "KeepDecision.counts has 1 entries", "2 entries")
    ),
    "counts too few images": Mistake(
        keep(counts=[[5], [5]]), (BEFORE, r"counts\[0\] has 1 entries", "2 entries, one per image")
    ),
    "flat counts": Mistake(
        keep(counts=[5, 5]), (BEFORE, r"counts\[0\] is 5", "a list of 2 entries, one per image")
    ),
    "counts on the device": Mistake(
        keep(counts=torch.tensor([[5, 5], [5, 0]])),
        (BEFORE, "counts is a torch.int64 tensor", "a list of 2 entries, one per batch row"),
    ),
    "counts beyond the image": Mistake(
        keep(counts=[[5, 37], [5]]), (BEFORE, r"counts\[0\]\[1\] is 37", "an int in 0 to 36")
    ),
    "fraction as count": Mistake(
        keep(counts=[[5, 0.5], [5]]), (BEFORE, r"counts\[0\]\[1\] is 0.5", "an int in 0 to 36")
    ),
    "word for positions": Mistake(
        keep(positions="compat"), (BEFORE, "positions is 'compat'", "'compact' or 'preserve'")
    ),
    "short hidden": Mistake(
        keep(hidden=lambda h, s: h[:, :9]),
        (BEFORE, "KeepDecision.hidden", r"\(2, 9, 32\)", r"\[2, 84, 32\]"),
    ),
    "hidden of another dtype": Mistake(
        keep(hidden=lambda h, s: h.double()),
        (
            BEFORE,
            "KeepDecision.hidden",
            "torch.float64",
            r"torch.float32 tensor of shape \[2, 84, 32\]",
        ),
    ),
    "hidden with NaN": Mistake(
        keep(hidden=nan_like), (BEFORE, "KeepDecision.hidden", "NaN", "finite"), True
    ),
    "short order": Mistake(
        keep(order=arange(84)), (BEFORE, "KeepDecision.order", r"\(84,\)", r"\[2, 84\]")
    ),
    "negative order": Mistake(
        keep(order=lambda h, s: -1 - s.segment.abs()),
        (BEFORE, "KeepDecision.order", "negative", "≥ 0"),
        True,
    ),
    "short group": Mistake(
        keep(group=lambda h, s: s.segment[:, :5]),
        (BEFORE, "KeepDecision.group", r"\(2, 5\)", r"\[2, 84\]"),
    ),
    "group outside the sequence": Mistake(
        keep(group=lambda h, s: arange(1, 85).expand(2, -1)),
        (BEFORE, "KeepDecision.group", "from 1 to 84", "in -1 to 83"),
        True,
    ),
    "group that goes": Mistake(
        keep(group=lambda h, s: arange(84).expand(2, -1)),
        (BEFORE, "KeepDecision.group", "do not stay", "a token that stays"),
        True,
    ),
    # the vision encoder
    "bare rows": Mistake(
        tower(lambda hidden, tokens: rows_of(hidden, range(9))),
        (AFTER, r"tensor of shape \(3, 9\)", "a Reduction"),
    ),
    "rows of one tile": Mistake(
        tower(lambda hidden, tokens: Reduction(arange(9))),
        (AFTER, "Reduction.rows", r"\(9,\)", r"\[3, T'\]"),
    ),
    "padding without counts": Mistake(
        reduce([0, 4, -1]), (AFTER, "Reduction.rows holds −1", "counts is None", "counts"), True
    ),
    "padding in front": Mistake(
        reduce([0, -1, 4], counts=[2, 2, 2]),
        (AFTER, "Reduction.rows", "padding", "padded at the end"),
        True,
    ),
    "rows outside": Mistake(
        reduce([0, 37]), (AFTER, "Reduction.rows", "from 0 to 37", "in -1 to 36"), True
    ),
    "class token dropped": Mistake(
        reduce([3, 4]),
        (AFTER, r"Reduction.rows starts with \[3, 3, 3\]", "class token stays first"),
        True,
    ),
    "counts of too few tiles": Mistake(
        reduce([0, 4, -1], counts=[2]), (AFTER, "Reduction.counts has 1", "3 entries, one per tile")
    ),
    "counts that are not the rows'": Mistake(
        reduce([0, 4, -1], counts=[3, 3, 3]),
        (AFTER, r"Reduction.counts is \[3, 3, 3\]", r"\[2, 2, 2\], the number of rows ≥ 0"),
        True,
    ),
    "hidden that is not the rows'": Mistake(
        reduce([0, 4], hidden=lambda h, t: h),
        (AFTER, "Reduction.hidden", r"\(3, 37, 32\)", r"\[3, 2, 32\]"),
    ),
    "merged rows with NaN": Mistake(
        reduce([0, 4], hidden=lambda h, t: nan_like(h)[:, :2]),
        (AFTER, "Reduction.hidden", "NaN", "finite"),
        True,
    ),
    "group of the new rows": Mistake(
        reduce([0, 4], group=lambda h, t: rows_of(h, [0, 1])),
        (AFTER, "Reduction.group", r"\(3, 2\)", r"\[3, 37\]"),
    ),
    "group outside the new rows": Mistake(
        reduce([0, 4], group=lambda h, t: rows_of(h, range(37))),
        (AFTER, "Reduction.group", "from 0 to 36", "in -1 to 1"),
        True,
    ),
    "bias of one dimension": Mistake(
        tower(bias_layers=frozenset({1})),
        (r"Tower.bias\(\) of encoder layer 1", r"\(37,\)", r"\[3, 1, 1, 37\]"),
    ),
    "no outcome": Mistake(
        tower(last=lambda tokens: None),
        (r"Tower.finish\(\)", "is None", "an? EncoderOutcome"),
    ),
    "score with the class token": Mistake(
        tower(last=lambda tokens: EncoderOutcome(score=torch.rand(3, 37))),
        (r"Tower.finish\(\)", "EncoderOutcome.score", r"\(3, 37\)", r"\[3, 36\]"),
    ),
    "tag of numbers": Mistake(
        tower(last=lambda tokens: EncoderOutcome(tag=torch.ones(3, 36))),
        (r"Tower.finish\(\)", "EncoderOutcome.tag", "torch.float32", "a torch.bool tensor"),
    ),
    "key of one tile": Mistake(
        tower(last=lambda tokens: EncoderOutcome(key=arange(36))),
        (r"Tower.finish\(\)", "EncoderOutcome.key", r"\(36,\)", r"\[3, 36\]"),
    ),
    # the cache
    "bare index of a cache": Mistake(
        decoder(cache=lambda seen: {7: arange(5)}), (CACHE, "answer is", "a CachePolicy")
    ),
    "cache of no layer": Mistake(
        decoder(cache=lambda seen: CachePolicy({8: arange(5).expand(2, -1)})),
        (CACHE, "CachePolicy.index names decoder layer 8", "0 to 7"),
    ),
    "cache index of another batch": Mistake(
        cached(lambda seen: arange(5)[None]),
        (CACHE, r"CachePolicy.index\[7\]", r"\(1, 5\)", r"\[2, n'\]"),
    ),
    "cache lengths of another batch": Mistake(
        cached(lambda seen: arange(5).expand(2, -1), lengths={7: [5]}),
        (CACHE, r"CachePolicy.lengths\[7\] has 1 entries", "2 entries, one per batch row"),
    ),
    "cache index outside": Mistake(
        cached(lambda seen: arange(80, 85).expand(2, -1)),
        (CACHE, r"CachePolicy.index\[7\]", "from 80 to 84", "in -1 to 83"),
        True,
    ),
    "cache index twice": Mistake(
        cached(lambda seen: torch.tensor([[60, 61], [60, 60]])),
        (CACHE, r"CachePolicy.index\[7\]", r"repeats \[60\]", "unique"),
        True,
    ),
    "cache lengths that are not the index's": Mistake(
        cached(lambda seen: torch.tensor([[60, 61], [-1, 60]]), lengths={7: [2, 2]}),
        (CACHE, r"CachePolicy.lengths\[7\] is \[2, 2\]", r"\[2, 1\], the number of index ≥ 0"),
        True,
    ),
}


def test_no_mistake_is_lost_from_the_table() -> None:
    assert len(MISTAKES) == 78
    assert sum(mistake.values for mistake in MISTAKES.values()) == 21


@pytest.fixture(scope="module")
def model() -> Any:
    model = llava()
    with torch.no_grad():
        model(**make_inputs(model, PROMPTS))  # transformers installs its own hooks lazily
    return model


@pytest.mark.parametrize("case", MISTAKES)
def test_mistake_is_named_and_leaves_the_model_usable(model: Any, case: str) -> None:
    mistake = MISTAKES[case]
    method = Flawed(mistake.plan)
    inputs, before = make_inputs(model, PROMPTS), fingerprint(model)
    with torch.no_grad():
        want = model(**inputs).logits
        with pytest.raises(ContractError) as error:
            with tokprune.compress(model, method, validate=mistake.values):
                model(**inputs)
    assert re.search("(?s)" + ".*".join((r"Flawed\(\)", *mistake.words)), str(error.value))
    assert not tokprune.is_patched(model)
    assert fingerprint(model) == before
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, want)


@pytest.mark.parametrize("case", ["counts that are not the mask's", "bare mask", "index twice"])
def test_patched_model_forgets_a_forward_that_failed(model: Any, case: str) -> None:
    """The next forward, without images, meets nothing of it."""
    inputs = make_inputs(model, PROMPTS)
    text = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        want = model(input_ids=text).logits
        with tokprune.compress(model, Flawed(MISTAKES[case].plan), validate=True) as trace:
            with pytest.raises(ContractError):
                model(**inputs)
            assert trace.last is None
            assert torch.equal(model(input_ids=text).logits, want)


def test_values_are_looked_at_under_validation_only(model: Any) -> None:
    method = Flawed(MISTAKES["counts that are not the mask's"].plan)
    inputs = make_inputs(model, PROMPTS)
    with torch.no_grad():
        with tokprune.compress(model, method, validate=False):
            model(**inputs)
        before = set_validation(False)
        try:
            with tokprune.compress(model, method):
                model(**inputs)
            set_validation(True)
            with pytest.raises(ContractError), tokprune.compress(model, method):
                model(**inputs)
        finally:
            set_validation(before)


def test_members_of_a_composition_are_named(model: Any) -> None:
    method = tokprune.compose(tokprune.Random(keep=7), Flawed(MISTAKES["a list is no plan"].plan))
    with pytest.raises(ContractError, match=r"^Flawed\(\).plan\(\)"):
        tokprune.patch(model, method)
    assert not tokprune.is_patched(model)


def test_features_that_were_not_finite_before_are_not_the_methods_fault(model: Any) -> None:
    inputs = make_inputs(model, PROMPTS)
    inputs["pixel_values"][0, 0, 0, 0] = float("nan")
    method = Flawed(one(lambda image: Selection(arange(4), image.features[:4])))
    with torch.no_grad(), tokprune.compress(model, method, validate=True):
        with pytest.raises(tokprune.NonFiniteFeaturesError):
            model(**inputs)
