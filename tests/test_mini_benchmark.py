"""The embedded benchmark: deterministic, balanced, and its answers follow from the layout."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokprune.eval.benchmarks import load_benchmark
from tokprune.eval.benchmarks.mini.benchmark import SPLITS
from tokprune.eval.benchmarks.mini.questions import GROUPS, TASKS, ask
from tokprune.eval.benchmarks.mini.render import render
from tokprune.eval.benchmarks.mini.scene import Scene, Thing, make_scene, random_state
from tokprune.eval.benchmarks.mini.world import GRID, KINDS, SIDE, SIZES, WORDS

numbers = st.integers(0, 10_000)


@pytest.fixture(scope="module")
def benchmark():
    return load_benchmark("mini")


def test_splits_are_balanced_and_distinct(benchmark) -> None:
    seen: set[str] = set()
    for split, (_, number) in SPLITS.items():
        items = benchmark.items(split)
        assert Counter(i.task for i in items) == dict.fromkeys(TASKS, number)
        ids = {i.id for i in items}
        assert len(ids) == len(items)
        assert not ids & seen
        seen |= ids
    assert len(benchmark.items("test")) >= 2000
    assert len(benchmark.items("quick")) >= 300


def test_a_limit_stays_balanced(benchmark) -> None:
    assert Counter(i.task for i in benchmark.items("quick", limit=48)) == dict.fromkeys(TASKS, 4)
    assert {i.task for i in benchmark.items("quick", tasks=["word", "count"], limit=5)} == {
        "word",
        "count",
    }


def test_groups_cover_the_tasks(benchmark) -> None:
    assert sorted(t for tasks in GROUPS.values() for t in tasks) == sorted(TASKS)
    assert set(benchmark.headline) <= set(TASKS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"split": "train"}, "split='train' should be one of 'quick', 'test', 'validation'"),
        ({"tasks": ["counting"]}, "task='counting' should be one of presence"),
        ({"limit": 0}, "limit=0 should be at least 1"),
    ],
)
def test_bad_input_is_named(benchmark, call: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        benchmark.items(**call)


def test_unknown_benchmark_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match="Did you mean 'mini'"):
        load_benchmark("minni")


def test_no_answer_is_likely_from_the_question_alone(benchmark) -> None:
    """The best answer per task, knowing the split's answers, stays near chance."""
    chance = {"presence": 0.5, "attribute": 0.5, "relation": 0.5, "count": 0.25, "tally": 0.25,
              "where": 0.25, "color": 0.125, "shape": 0.125, "size": 0.25}  # fmt: skip
    for task in TASKS:
        answers = Counter(i.answers[0] for i in benchmark.items("test", tasks=[task]))
        share = max(answers.values()) / sum(answers.values())
        assert share < chance.get(task, 0.02) + 0.15, (task, answers.most_common(3))


@given(numbers)
@settings(max_examples=25, deadline=None)
def test_a_scene_is_what_it_claims(number: int) -> None:
    scene = make_scene(7, number)
    assert scene == make_scene(7, number)
    assert 8 <= len(scene.things) <= 20  # a full image may have no room for the last ones
    assert 1 <= len(scene.plates) <= 4
    taken = np.zeros((GRID, GRID), dtype=int)
    for thing in (*scene.things, *scene.distractors):
        taken[thing.row : thing.row + thing.side, thing.col : thing.col + thing.side] += 1
    for plate in scene.plates:
        taken[plate.row : plate.row + 2, plate.col : plate.col + plate.width] += 1
    assert taken.max() == 1
    assert len({p.color for p in scene.plates}) == len(scene.plates)
    for plate in scene.plates:
        assert not any(plate.text.startswith(w) for w in WORDS if len(w) > 1)


def test_the_same_scene_gives_the_same_pixels_and_others_do_not() -> None:
    first, again, other = (np.asarray(render(make_scene(7, n))) for n in (1, 1, 2))
    assert first.shape == (SIDE, SIDE, 3)
    assert (first == again).all()
    assert (first != other).mean() > 0.5


def test_ground_varies_from_patch_to_patch(benchmark) -> None:
    """Clean backgrounds would favour diversity methods: neighbours must differ."""
    pixels = np.asarray(benchmark.image(benchmark.items("quick")[0])).astype(float)
    patches = pixels.reshape(GRID, 8, GRID, 8, 3).mean((1, 3))
    assert np.abs(np.diff(patches, axis=1)).mean() > 4


def _one(scene: Scene, kind: str) -> Thing:
    (thing,) = [t for t in scene.things if t.kind == kind]
    return thing


def _check(scene: Scene, task: str, question: str, answer: str) -> None:
    """The answer worked out again from the words of the question."""
    words = question.split()
    named = [w for w in words if w in KINDS]
    if task == "presence":
        color = words[3] if len(words) == 6 else None
        found = [t for t in scene.things if t.kind == named[0] and color in (None, t.color)]
        assert answer == ("yes" if found else "no")
    elif task == "attribute":
        assert answer == ("yes" if _one(scene, named[0]).color == words[3] else "no")
    elif task == "color":
        assert _one(scene, named[0]).color == answer
    elif task == "shape":
        assert [t.kind for t in scene.things if t.color == words[3]] == [answer]
    elif task == "count":
        assert int(answer) == sum(t.kind == named[0] for t in scene.things)
    elif task == "tally":
        assert int(answer) == sum(t.color == words[4] for t in scene.things)
    elif task == "size":
        a, b = (_one(scene, kind) for kind in named)
        assert answer == max((a, b), key=lambda t: SIZES[t.size]).kind
        assert a.size != b.size
    elif task == "where":
        row, col = _one(scene, named[0]).center
        assert answer == f"{'top' if row < 12 else 'bottom'} {'left' if col < 12 else 'right'}"
    elif task == "relation":
        a, b = (_one(scene, kind) for kind in named)
        axis = 0 if words[3] in ("above", "below") else 1
        before = a.center[axis] < b.center[axis]
        assert answer == ("yes" if before == (words[3] in ("above", "left")) else "no")
    elif task in ("number", "word"):
        assert [p.text for p in scene.plates if p.is_number == (task == "number")] == [answer]
    else:
        assert [p.text for p in scene.plates if p.color == words[5]] == [answer]


@given(numbers)
@settings(max_examples=40, deadline=None)
def test_every_answer_follows_from_the_layout(number: int) -> None:
    scene = make_scene(8, number)
    for task in TASKS:
        rng = random_state(scene.key, task)
        for _ in range(3):
            if (pair := ask(scene, task, rng)) is not None:
                _check(scene, task, *pair)
