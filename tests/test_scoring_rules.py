"""Rules of scores: examples of the benchmarks, and what holds for any text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokprune.eval.benchmarks.base import Item
from tokprune.eval.benchmarks.scores import SCORINGS
from tokprune.eval.benchmarks.scores.anls import distance
from tokprune.eval.benchmarks.scores.letters import chosen
from tokprune.eval.benchmarks.scores.vqa import normalised


def score(rule: str, answer: str, *accepted: str, **meta: object) -> float:
    return SCORINGS[rule](answer, Item("1", "all", "x", "?", accepted, meta))


@pytest.mark.parametrize(
    ("agreeing", "wanted"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)]
)
def test_vqa_counts_all_but_one_of_the_people(agreeing: int, wanted: float) -> None:
    people = ["two"] * agreeing + ["cat"] * (10 - agreeing)
    assert score("vqa", "2", *people) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("A dog", "dog"), ("The dogs!", "dogs"), ("Two", "2"), ("none", "0"), ("ten", "10"),
        ("dont", "don't"), ("isnt", "isn't"), ("couldnt've", "couldn't've"), ("hed", "he'd"),
        ("1,000", "1000"), ("red-blue", "red blue"), ("red - blue", "red blue"),
        ("red/blue", "red blue"), ("3.5", "3.5"), ("yes.", "yes"), ("st. john", "st john"),
        ("a\n b\tc", "b c"), ("the", ""), ("757", "757"), ("what ?", "what"), ("im", "im"),
    ],
)  # fmt: skip
def test_vqa_normalisation(text: str, wanted: str) -> None:
    assert normalised(text) == wanted


@pytest.mark.parametrize(
    ("answer", "accepted", "wanted"),
    [
        ("Red", ["red"], 1.0), ("red  car", ["red car"], 1.0), ("rod", ["red"], 2 / 3),
        ("abcd", ["abxy"], 0.5), ("abc", ["axy"], 0.0), ("", ["red"], 0.0),
        ("blue", ["red", "blues"], 0.8), ("x" * 50_000, ["red"], 0.0),
    ],
)  # fmt: skip
def test_anls(answer: str, accepted: list[str], wanted: float) -> None:
    assert score("anls", answer, *accepted) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("answer", "accepted", "wanted"),
    [
        ("105", "100", 1), ("95", "100", 1), ("106", "100", 0), ("-100", "100", 0),
        ("51%", "50%", 1), ("0.51", "50%", 1), ("50", "50%", 0), ("0", "0", 1), ("0.0", "0", 0),
        ("Yes", "yes", 1), ("no", "yes", 0), ("nan", "nan", 1), ("inf", "1", 0), ("1_00", "100", 0),
        ("1e2", "100", 1), ("2016", "2010", 1),
    ],
)  # fmt: skip
def test_relaxed_accuracy(answer: str, accepted: str, wanted: float) -> None:
    assert score("relaxed", answer, accepted) == wanted


OPTIONS = {"A": "a red cat", "B": "two dogs", "C": "dogs", "D": "none of these"}


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("B", "B"), ("b", "B"), ("(B)", "B"), ("B.", "B"), ("B. two dogs", "B"), ("b) dogs", "B"),
        ("**B**", "B"), ("The answer is B.", "B"), ("Answer: C", "C"), ("Option D", "D"),
        ("two dogs", "B"), ("Dogs.", "C"), ("I think it is C", "C"), ("A", "A"), ("A: yes", "A"),
        ("A dog is in it", None), ("A red cat", "A"), ("either B or C", None), ("E", None),
        ("", None), ("there are none of these", "D"), ("cats", None), ("because", None),
    ],
)  # fmt: skip
def test_options(answer: str, wanted: str | None) -> None:
    assert chosen(answer, OPTIONS) == wanted


def test_letters_without_options() -> None:
    assert score("letter", "C. dogs", "C") == 1
    assert score("letter", "dogs", "C") == 0
    assert score("letter", "Dogs", "dogs") == 1  # an open question among them


@pytest.mark.parametrize(
    ("answer", "pope", "mme", "either"),
    [
        ("Yes", "yes", "yes", "yes"), ("No, it is not.", "no", "no", "no"),
        ("There is not.", "no", None, None), ("It is. No doubt", "yes", None, "no"),
        ("yes and no", "no", "yes", None), ("757", "yes", None, None), ("nothing", "yes", "no",
         None), ("YES!", "yes", "yes", "yes"),
    ],
)  # fmt: skip
def test_yes_or_no(answer: str, pope: str, mme: str | None, either: str | None) -> None:
    for rule, said in (("pope", pope), ("mme", mme), ("yes-no", either)):
        assert (score(rule, answer, "Yes"), score(rule, answer, "no")) == (
            said == "yes", said == "no",
        )  # fmt: skip


def test_contains() -> None:
    assert score("contains", "The sign says STOP now", "stop") == 1
    assert score("contains", "top", "stop", "") == 0
    formula = {"category": "Handwritten Mathematical Expression Recognition"}
    assert score("contains", "it is \\frac{ a }{ b }", "\\frac {a} {b}", **formula) == 1
    assert score("contains", "\\frac{A}{b}", "\\frac{a}{b}", **formula) == 0


TEXT = st.text(max_size=30)


@given(st.sampled_from(sorted(SCORINGS)), TEXT, st.lists(TEXT, min_size=1, max_size=10))
def test_every_score_is_a_share(rule: str, answer: str, accepted: list[str]) -> None:
    options = {"options": {"A": "x", "B": answer}}
    assert 0 <= score(rule, answer, *accepted) <= 1
    assert 0 <= score(rule, answer, *accepted, **options) <= 1


@given(TEXT)
def test_normalising_twice_changes_nothing_but_marks_that_met(text: str) -> None:
    once = normalised(text)
    assert once == once.strip().lower()
    assert not set(once.split()) & {"an", "the", "zero", "one"}


@given(TEXT, TEXT)
def test_the_distance_is_one(one: str, other: str) -> None:
    assert distance(one, other) == distance(other, one)
    assert abs(len(one) - len(other)) <= distance(one, other) <= max(len(one), len(other))
    assert (distance(one, other) == 0) == (one == other)
    assert distance(one + "x", one) == 1


@given(st.sampled_from("ABCD"), st.sampled_from(["{}", "({})", "{}.", "{}: x", "the answer is {}"]))
def test_a_letter_is_found_in_its_usual_forms(letter: str, form: str) -> None:
    assert chosen(form.format(letter), OPTIONS) == letter
