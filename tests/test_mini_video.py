"""The embedded video task: deterministic, balanced, unambiguous, and no frame alone will do."""

from __future__ import annotations

import importlib
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import tokprune.eval.benchmarks as evals
from tokprune.eval.benchmarks.mini.world import CHARACTERS, GRID, PATCH, SIDE
from tokprune.eval.benchmarks.mini_video import MiniVideoBenchmark
from tokprune.eval.benchmarks.mini_video.benchmark import SPLITS
from tokprune.eval.benchmarks.mini_video.clip import CHANCE, GROUPS, TASKS, WORDS, Actor, Clip
from tokprune.eval.benchmarks.mini_video.make import SPEED, make_clip
from tokprune.eval.benchmarks.mini_video.render import NOISE, changed, evidence, render
from tokprune.eval.sweep import Settings, run_sweep

ROOT = Path(__file__).resolve().parent.parent
numbers = st.integers(0, 10_000)


@pytest.fixture(scope="module")
def benchmark() -> MiniVideoBenchmark:
    found = evals.load_benchmark("mini-video")
    assert isinstance(found, MiniVideoBenchmark)
    return found


# ---------------------------------------------------------------------- the benchmark


def test_it_is_a_benchmark_of_videos(benchmark: MiniVideoBenchmark) -> None:
    item = benchmark.items("quick")[0]
    frames = benchmark.video(item)
    assert benchmark.media == "video"
    assert [(f.mode, f.size) for f in frames] == [("RGB", (SIDE, SIDE))] * 8
    with pytest.raises(ValueError, match="asks about videos, and item 'moved-quick-00000' has no"):
        benchmark.image(item)


def test_benchmarks_of_images_have_no_video() -> None:
    images = evals.load_benchmark("mini")
    assert images.media == "image"
    with pytest.raises(ValueError, match="benchmark mini asks about images"):
        images.video(images.items("quick", limit=1)[0])


def test_a_sweep_refuses_it(tmp_path: Path) -> None:
    settings = Settings(model="mini", benchmark="mini-video", out=str(tmp_path), keep=("1/4",))
    with pytest.raises(ValueError, match="mini-video asks about videos"):
        run_sweep(settings)


def test_splits_are_balanced_and_distinct(benchmark: MiniVideoBenchmark) -> None:
    seen: set[str] = set()
    for split, (_, number) in SPLITS.items():
        items = benchmark.items(split)
        assert Counter(i.task for i in items) == dict.fromkeys(TASKS, number)
        ids = {i.id for i in items}
        assert len(ids) == len(items) == len({i.image_id for i in items})
        assert not ids & seen
        seen |= ids
    assert len({seed for seed, _ in SPLITS.values()} | {1, 2, 3}) == len(SPLITS) + 3


def test_a_limit_stays_balanced(benchmark: MiniVideoBenchmark) -> None:
    assert Counter(i.task for i in benchmark.items(limit=20)) == dict.fromkeys(TASKS, 4)
    chosen = benchmark.items("test", tasks=["first", "moved"], limit=5)
    assert [i.task for i in chosen] == ["moved", "first", "moved", "first", "moved"]


def test_groups_cover_the_tasks(benchmark: MiniVideoBenchmark) -> None:
    assert sorted(t for tasks in GROUPS.values() for t in tasks) == sorted(TASKS)
    assert benchmark.headline == tuple(task for task in TASKS if task != "direction")
    assert set(CHANCE) == set(TASKS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"split": "train"}, "split='train' should be one of 'quick', 'test', 'validation'"),
        ({"tasks": ["motion"]}, "task='motion' should be one of moved"),
        ({"limit": 0}, "limit=0 should be at least 1"),
    ],
)
def test_bad_input_is_named(benchmark: MiniVideoBenchmark, call: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        benchmark.items(**call)


def test_too_few_frames_and_unknown_types_are_named() -> None:
    with pytest.raises(ValueError, match="frames=3 should be at least 4"):
        MiniVideoBenchmark(frames=3)
    with pytest.raises(ValueError, match="frames=3 should be at least 4"):
        make_clip(1, 1, "moved", frames=3)
    with pytest.raises(ValueError, match="task='stopped' should be one of moved"):
        make_clip(1, 1, "stopped")


def test_other_numbers_of_frames_are_another_version(benchmark: MiniVideoBenchmark) -> None:
    longer = MiniVideoBenchmark(frames=12)
    assert longer.version != benchmark.version
    assert len(longer.video(longer.items()[0])) == 12


# ---------------------------------------------------------------------- pixels


@pytest.mark.parametrize("task", TASKS)
def test_the_same_clip_gives_the_same_pixels_and_others_do_not(task: str) -> None:
    first, again, other = (_pixels(make_clip(7, n, task)) for n in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).mean() > 0.5


def test_noise_is_small_and_new_in_every_frame() -> None:
    clip = make_clip(7, 1, "appeared")
    off = _pixels(clip).astype(int) - _pixels(clip, noise=0)
    assert np.abs(off).max() == NOISE
    assert (off[0] != off[1]).mean() > 0.5


def test_an_object_on_an_edge_is_drawn_at_both_edges() -> None:
    clip = make_clip(7, 1, "moved")
    actor = Actor("square", "red", 16, SIDE - 5, 40, step=(0, 0), moves=(0, 0), seen=(0, 8))
    bare, drawn = (_pixels(replace(clip, actors=who), noise=0)[0] for who in ((), (actor,)))
    columns = np.flatnonzero((bare != drawn).any((0, 2)))
    inset = 2  # the square is smaller than its box
    assert set(range(SIDE - 5 + inset, SIDE)) <= set(columns)
    assert set(range(11 - inset)) <= set(columns)
    assert set(columns) <= {x % SIDE for x in range(SIDE - 5, SIDE + 11)}


@given(numbers, st.sampled_from(TASKS))
@settings(max_examples=20, deadline=None)
def test_what_changes_is_where_something_happens(number: int, task: str) -> None:
    clip = make_clip(9, number, task)
    found, shown = changed(clip), evidence(clip)
    assert shown.any()
    assert not (shown & ~found).any()
    assert not found[0].any()
    for frame in range(1, clip.frames):
        may = np.zeros((GRID, GRID), dtype=bool)
        for actor in clip.actors:
            if actor.at(frame) != actor.at(frame - 1):
                for place in (actor.at(frame), actor.at(frame - 1)):
                    may |= _touched(actor, place)
        for sign in clip.signs:
            if sign.visible(frame) != sign.visible(frame - 1):
                row, col = sign.plate.row, sign.plate.col
                may[row : row + 2, col : col + sign.plate.width] = True
        assert not (found[frame] & ~may).any()


def _pixels(clip: Clip, noise: int = NOISE) -> np.ndarray:
    return np.stack([np.asarray(frame) for frame in render(clip, noise)])


def _touched(actor: Actor, place: tuple[int, int] | None) -> np.ndarray:
    """[GRID, GRID] bool: patches under the actor's box, worked out pixel by pixel."""
    pixels = np.zeros((SIDE, SIDE), dtype=bool)
    if place is not None:
        xs, ys = ((start + np.arange(actor.side)) % SIDE for start in place)
        pixels[np.ix_(ys, xs)] = True
    touched: np.ndarray = np.any(pixels.reshape(GRID, PATCH, GRID, PATCH), axis=(1, 3))
    return touched


# ---------------------------------------------------------------------- answers


def _solve(clip: Clip) -> str:
    """The answer worked out from the words of the question and where things are; each step fails
    where it would be ambiguous."""
    question, last = clip.question, clip.frames - 1
    by_name: dict[str, Actor] = {actor.name: actor for actor in clip.actors}
    assert len(by_name) == len(clip.actors)
    if question == "which shape moved ?":
        (actor,) = [a for a in clip.actors if a.color and _moving_frames(a, clip)]
        return actor.name
    if question.startswith("did the "):
        name, ways = question.removeprefix("did the ").removesuffix(" ?").split(" move ")
        steps = {_way(by_name[name], frame) for frame in _moving_frames(by_name[name], clip)}
        (way,) = steps
        assert way in ways.split(" or ")
        return way
    if question.startswith("which moved first , the "):
        names = question.removeprefix("which moved first , the ").removesuffix(" ?")
        one, other = names.split(" or the ")
        begin = {name: _moving_frames(by_name[name], clip) for name in (one, other)}
        assert len(begin[one]) == len(begin[other]) > 0
        assert set(begin[one]).isdisjoint(begin[other])
        return min(begin, key=lambda name: begin[name][0])
    if question == "how many objects appeared ?":
        assert not any(_moving_frames(a, clip) for a in clip.actors)
        came = [a for a in clip.actors if a.at(0) is None and a.at(last) is not None]
        went = [a for a in clip.actors if a.at(0) is not None and a.at(last) is None]
        stayed = [a for a in clip.actors if all(a.at(f) is not None for f in range(last + 1))]
        never = [a for a in clip.actors if all(a.at(f) is None for f in range(last + 1))]
        assert len(came) + len(went) + len(stayed) + len(never) == len(clip.actors)
        return str(len(came))
    assert question == "what text flashed ?"
    (sign,) = [s for s in clip.signs if not s.visible(0)]
    shown = [frame for frame in range(last + 1) if sign.visible(frame)]
    assert len(shown) in (1, 2)
    assert last not in shown
    return sign.plate.text


def _moving_frames(actor: Actor, clip: Clip) -> list[int]:
    """Frames in which it is elsewhere than in the frame before."""
    return [
        frame
        for frame in range(1, clip.frames)
        if None not in (places := (actor.at(frame - 1), actor.at(frame))) and places[0] != places[1]
    ]


def _way(actor: Actor, frame: int) -> str:
    """Which way it came to its place in a frame, the shorter way around."""
    before, now = actor.at(frame - 1), actor.at(frame)
    assert before is not None
    assert now is not None
    x, y = ((b - a + SIDE // 2) % SIDE - SIDE // 2 for a, b in zip(before, now))
    assert (x == 0) != (y == 0)
    return ("right" if x > 0 else "left") if x else ("down" if y > 0 else "up")


@given(numbers, st.sampled_from(TASKS), st.integers(4, 16))
@settings(max_examples=150, deadline=None)
def test_every_answer_follows_from_the_scene(number: int, task: str, frames: int) -> None:
    clip = make_clip(8, number, task, frames)
    assert clip == make_clip(8, number, task, frames)
    assert clip.task == task
    assert _solve(clip) == clip.answer


@given(numbers, st.sampled_from(TASKS))
@settings(max_examples=60, deadline=None)
def test_nothing_hides_what_is_asked_about(number: int, task: str) -> None:
    """Actors never overlap, and texts that are asked about lie on top, apart from each other."""
    clip = make_clip(8, number, task)
    for frame in range(clip.frames):
        covered = np.zeros((SIDE, SIDE), dtype=int)
        for actor in clip.actors:
            if (place := actor.at(frame)) is not None:
                assert all(0 <= start < SIDE for start in place)
                xs, ys = ((start + np.arange(actor.side)) % SIDE for start in place)
                covered[np.ix_(ys, xs)] += 1
        assert covered.max() == 1
    plates = [sign.plate for sign in clip.signs]
    taken = np.zeros((GRID, GRID), dtype=int)
    for plate in plates:
        taken[plate.row : plate.row + 2, plate.col : plate.col + plate.width] += 1
    assert taken.sum() == sum(2 * plate.width for plate in plates)
    assert taken.max() == 1
    assert clip.signs_on_top == (task == "flashed")
    assert len({plate.text for plate in plates}) == len({p.color for p in plates}) == len(plates)


def test_every_word_is_listed(benchmark: MiniVideoBenchmark) -> None:
    for item in benchmark.items("test"):
        assert set(item.question.split()) <= set(WORDS)
        if item.task not in ("appeared", "flashed"):
            assert set(item.answers[0].split()) <= set(WORDS)


def test_no_answer_is_likely_from_the_question_alone(benchmark: MiniVideoBenchmark) -> None:
    for task in TASKS:
        items = benchmark.items("test", tasks=[task])
        if task == "first":
            told = ["the " + i.answers[0] + " or" in i.question for i in items]
            assert sum(told) == len(items) / 2
            continue
        ways = {i.question if task != "direction" else i.question.split()[-2] for i in items}
        for way in ways:
            answers = Counter(i.answers[0] for i in items if way in i.question.split() or
                              way == i.question)  # fmt: skip
            share = max(answers.values()) / sum(answers.values())
            assert share <= {"direction": 0.5, "appeared": 0.25}.get(task, 0.1), (task, answers)


# ---------------------------------------------------------------------- one frame is not enough


def _anchored(actor: Actor, frame: int, step: tuple[int, int], moves: tuple[int, int]) -> Actor:
    """The actor moving otherwise, but where it was in one frame."""
    place = actor.at(frame)
    assert place is not None
    done = min(max(frame, moves[0]), moves[1]) - moves[0]
    x, y = ((p - done * s) % SIDE for p, s in zip(place, step))
    return replace(actor, x=x, y=y, step=step, moves=moves)


def _with(clip: Clip, changes: dict[int, Actor], question: str = "", answer: str = "") -> Clip:
    actors = tuple(changes.get(i, actor) for i, actor in enumerate(clip.actors))
    return replace(clip, actors=actors, answer=answer)


def _moved_twins(clip: Clip, frame: int) -> Iterator[Clip]:
    """Any other shape is the one that moves."""
    (at,) = clip.targets
    mover = clip.actors[at]
    for i, actor in enumerate(clip.actors):
        if actor.color and i != at:
            yield _with(clip, {
                at: _anchored(mover, frame, (0, 0), (0, 0)),
                i: _anchored(actor, frame, mover.step, mover.moves),
            }, answer=actor.name)  # fmt: skip


def _direction_twins(clip: Clip, frame: int) -> Iterator[Clip]:
    """It moves the other way."""
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
    (at,) = clip.targets
    actor = clip.actors[at]
    back = _anchored(actor, frame, (-actor.step[0], -actor.step[1]), actor.moves)
    yield _with(clip, {at: back}, answer=opposite[clip.answer])


def _first_twins(clip: Clip, frame: int) -> Iterator[Clip]:
    """The other one moves first."""
    early, late = clip.targets
    one, other = clip.actors[early], clip.actors[late]
    yield _with(clip, {
        early: _anchored(one, frame, one.step, other.moves),
        late: _anchored(other, frame, other.step, one.moves),
    }, answer=other.name)  # fmt: skip


def _appeared_twins(clip: Clip, frame: int) -> Iterator[Clip]:
    """One more, or one fewer, appears; with it another one vanishes, in the same frame."""
    last = clip.frames
    came = {i: a.seen[0] for i, a in enumerate(clip.actors) if a.seen[0] > 0}
    went = {i: a.seen[1] for i, a in enumerate(clip.actors) if a.seen[0] == 0 < a.seen[1] < last}
    stay = [i for i, a in enumerate(clip.actors) if a.seen == (0, last)]
    away = [i for i, a in enumerate(clip.actors) if a.seen == (0, 0)]

    def seen(who: int, frames: tuple[int, int]) -> dict[int, Actor]:
        return {who: replace(clip.actors[who], seen=frames)}

    if int(clip.answer) < 4 and stay and away:
        for when in range(1, last):
            # what is seen in this frame decides which of the two is the one that comes
            if when <= frame:
                changes = seen(stay[0], (when, last)) | seen(away[0], (0, when))
            else:
                changes = seen(away[0], (when, last)) | seen(stay[0], (0, when))
            yield _with(clip, changes, answer=str(int(clip.answer) + 1))
    pairs = [(i, j, f) for i, f in came.items() for j, g in went.items() if f == g]
    if int(clip.answer) > 1:
        for i, j, when in pairs:
            here, gone = (i, j) if when <= frame else (j, i)
            changes = seen(here, (0, last)) | seen(gone, (0, 0))
            yield _with(clip, changes, answer=str(int(clip.answer) - 1))


def _flashed_twins(clip: Clip, frame: int) -> Iterator[Clip]:
    """Any other text is the one that flashes, or, while it is not there, the text is another."""
    assert clip.flash is not None
    sign = clip.signs[clip.flash]
    for i, other in enumerate(clip.signs):
        signs = list(clip.signs)
        if i != clip.flash and sign.visible(frame):
            signs[clip.flash] = replace(sign, seen=other.seen)
            signs[i] = replace(other, seen=sign.seen)
        elif i == clip.flash and not sign.visible(frame):
            text = "".join(CHARACTERS[CHARACTERS.index(c) - 1] for c in sign.plate.text)
            signs[i] = replace(sign, plate=replace(sign.plate, text=text))
        else:
            continue
        yield replace(clip, signs=tuple(signs), answer=signs[i].plate.text)


TWINS: dict[str, Callable[[Clip, int], Iterator[Clip]]] = {
    "moved": _moved_twins,
    "direction": _direction_twins,
    "first": _first_twins,
    "appeared": _appeared_twins,
    "flashed": _flashed_twins,
}


@pytest.mark.parametrize("task", TASKS)
def test_every_frame_is_also_one_of_a_clip_with_another_answer(task: str) -> None:
    """The same frame, bit by bit, from a clip that is as likely: places are drawn evenly from the
    whole lane, roles evenly, frames of coming and going evenly."""
    for number in range(3):
        clip = make_clip(11, number, task)
        own = render(clip)
        for frame in range(clip.frames):
            twins = list(TWINS[task](clip, frame))
            assert {twin.answer for twin in twins} - {clip.answer}
            if task == "moved":
                assert len(twins) == 1 / CHANCE["moved"] - 1
            if task == "flashed" and clip.signs[clip.flash or 0].visible(frame):
                assert len(twins) == 1 / CHANCE["flashed"] - 1
            for twin in twins[:2]:
                assert _solve(twin) == twin.answer != clip.answer
                assert render(twin)[frame].tobytes() == own[frame].tobytes()


Guess = Callable[[Clip, int], object]


def _place(clip: Clip, frame: int, who: int) -> int:
    """Eighth of its lane that an actor is in."""
    place = clip.actors[who].at(frame)
    assert place is not None
    axis = 0 if any(a.step[0] for a in clip.actors) else 1
    return place[axis] * 8 // SIDE


#: what one frame shows, and the answer as it relates to that
CUES: dict[str, tuple[Guess, Callable[[Clip, int], object]]] = {
    "moved": (
        lambda clip, frame: tuple(_place(clip, frame, i) in (3, 4) for i in range(4)),
        lambda clip, frame: clip.targets[0],
    ),
    "direction": (
        lambda clip, frame: (clip.question.split()[-2], _place(clip, frame, clip.targets[0])),
        lambda clip, frame: clip.answer,
    ),
    "first": (
        lambda clip, frame: tuple(_place(clip, frame, i) // 4 for i in _mentioned(clip)),
        lambda clip, frame: clip.targets[0] == _mentioned(clip)[0],
    ),
    "appeared": (
        lambda clip, frame: sum(actor.at(frame) is not None for actor in clip.actors),
        lambda clip, frame: clip.answer,
    ),
    "flashed": (
        lambda clip, frame: clip.signs[0].plate.row // 8,
        lambda clip, frame: clip.flash,
    ),
}


def _mentioned(clip: Clip) -> list[int]:
    return sorted(clip.targets, key=lambda i: clip.question.index(f"the {clip.actors[i].name} "))


@pytest.mark.parametrize("task", TASKS)
def test_what_one_frame_shows_does_not_help_to_guess(task: str) -> None:
    """The best guess by what a frame shows, learned on other clips, is at chance in every frame."""
    cue, answer = CUES[task]
    many = 400
    learn, ask = ([make_clip(seed, n, task) for n in range(many)] for seed in (12, 13))
    for frame in range(8):
        seen: dict[object, Counter] = {}
        for clip in learn:
            seen.setdefault(cue(clip, frame), Counter())[answer(clip, frame)] += 1
        right = sum(
            answer(clip, frame) == seen[cue(clip, frame)].most_common(1)[0][0]
            for clip in ask
            if cue(clip, frame) in seen
        )
        chance = CHANCE[task]
        error = math.sqrt(chance * (1 - chance) / many)
        assert abs(right / many - chance) < 4 * error, (frame, right / many)


def test_two_frames_do_help() -> None:
    """What the test above would find if there were something to be found."""
    clips = [make_clip(13, n, "direction") for n in range(100)]
    assert all(_way(c.actors[c.targets[0]], 1) == c.answer for c in clips)
    speeds = {max(map(abs, c.actors[c.targets[0]].step)) for c in clips}
    assert speeds == set(range(SPEED[0], SPEED[1] + 1))


# ---------------------------------------------------------------------- scripts


def _script(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module(name)


def test_a_contact_sheet_shows_a_clip_of_every_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "clips.png"
    show = _script("show_clips", monkeypatch)
    monkeypatch.setattr(sys, "argv", ["show_clips.py", "--out", str(path), "--first", "1"])
    show.main()
    with Image.open(path) as drawn:
        assert drawn.width > 8 * show.SIDE
        assert drawn.height > 5 * show.SIDE
        colors = drawn.convert("RGB").getcolors(1 << 16)
        assert colors is not None
        assert len(colors) > 100
    assert path.stat().st_size < 300_000
    assert (ROOT / "docs" / "clips.png").stat().st_size < 300_000


def test_token_statistics_are_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tokprune.operators.temporal")
    import torch

    tokens = _script("video_tokens", monkeypatch)
    samples = list(tokens.load_samples("validation", 1, tokens.pixel_features))
    assert [s.task for s in samples] == list(TASKS)
    for sample in samples:
        assert sample.x.shape == (8, GRID * GRID, PATCH * PATCH * 3)
        assert -1 <= sample.x.min() < sample.x.max() <= 1
        for name in tokens.SELECTIONS:
            mask = tokens.kept(sample, name, 1 / 4)
            assert mask.sum() == 8 * GRID * GRID / 4, name
        mask = tokens.kept(sample, "evs", 1 / 2)
        assert mask[: GRID * GRID].all()
        found = tokens.figures(sample, mask)
        assert found["changed"] == pytest.approx(
            (mask & sample.changed).sum().item() / sample.changed.sum().item()
        )
        assert found["evidence"] > 0.9
        everything = tokens.figures(sample, torch.ones_like(mask))
        assert set(everything.values()) == {1.0}
    score, truth = torch.tensor([3.0, 1.0, 2.0, 2.0]), torch.tensor([True, False, True, False])
    assert tokens._roc_area(score, truth) == (1 + 1 + 1 + 0.5) / 4
    assert tokens.detection(samples)["roc_area"] > 0.9
