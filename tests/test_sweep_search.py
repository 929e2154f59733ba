"""Matching a budget in few measurements, and the identity of rows: properties."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokprune.eval.sweep.identity import canonical, checkpoint_hash, digest, row_id
from tokprune.eval.sweep.search import CLOSE, nearest


@st.composite
def knobs(draw: st.DrawFn) -> tuple[list[float], set[int], float]:
    """A rising measurement of the settings 1…n, which of them there are, a target."""
    n = draw(st.integers(1, 60))
    rises = draw(st.lists(st.floats(0, 9), min_size=n, max_size=n))
    values = [draw(st.floats(0, 50))]
    for rise in rises[1:]:
        values.append(values[-1] + rise)
    there = draw(st.sets(st.integers(1, n), min_size=1))
    return values, there, draw(st.floats(0, 400))


@settings(max_examples=60, deadline=None)
@given(knobs())
def test_nearest_equals_trying_everything(case: Any) -> None:
    values, there, target = case
    asked: list[int] = []

    def measure(k: int) -> float:
        assert k in there, "measured a setting that does not exist"
        asked.append(k)
        return values[k - 1]

    found = nearest(measure, there.__contains__, 1, len(values), target)
    assert found is not None
    k, value = found
    assert value == values[k - 1]
    best = min(abs(values[j - 1] - target) for j in there)
    assert abs(value - target) <= max(best, CLOSE)
    assert len(asked) == len(set(asked)), "measured twice"
    assert len(asked) <= 16  # 3 + 2 · log2(60)


def test_exact_methods_need_one_measurement_and_far_targets_two() -> None:
    asked: list[int] = []

    def measure(k: int) -> float:
        asked.append(k)
        return 200 + k / 2

    assert nearest(measure, lambda k: True, 1, 576, 64) == (1, 200.5)
    assert len(asked) == 2
    assert nearest(float, lambda k: True, 1, 576, 64) == (64, 64.0)
    assert nearest(float, lambda k: False, 1, 576, 64) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(JSON, JSON)
def test_canonical_text_is_equal_exactly_for_equal_values(a: Any, b: Any) -> None:
    assert canonical(a) == canonical(copy.deepcopy(a))
    if isinstance(a, dict):
        assert canonical(a) == canonical(dict(reversed(a.items())))
    assert (canonical(a) == canonical(b)) == (_typed(a) == _typed(b))


def _typed(value: Any) -> Any:
    """A value in which 1, 1.0 and True differ, as they do for ``keep``."""
    if isinstance(value, dict):
        return {name: _typed(own) for name, own in value.items()}
    if isinstance(value, list):
        return list(map(_typed, value))
    return type(value).__name__, repr(value)


def test_a_count_is_not_a_share() -> None:
    assert digest({"keep": 1}) != digest({"keep": 1.0})
    assert digest({"layers": (1, 2)}) == digest({"layers": [1, 2]})


RUN = {"model": {"hash": "m"}, "benchmark": {"version": "v"}, "code": "c"}
CELL = {"arm": "todre", "options": {"keep": 9}, "dtype": "float32", "batch_size": 4, "seed": 0}


@pytest.mark.parametrize(
    "change",
    [
        lambda run, cell: run["model"].update(hash="n"),
        lambda run, cell: run["benchmark"].update(version="w"),
        lambda run, cell: run.update(code="d"),
        lambda run, cell: cell.update(arm="fastv"),
        lambda run, cell: cell["options"].update(keep=10),
        lambda run, cell: cell["options"].update(tau=0.1),
        lambda run, cell: cell.update(dtype="bfloat16"),
        lambda run, cell: cell.update(batch_size=1),
        lambda run, cell: cell.update(seed=1),
    ],
)
def test_everything_that_can_change_an_answer_changes_the_identity(change: Any) -> None:
    run, cell = copy.deepcopy(RUN), copy.deepcopy(CELL)
    before = row_id(run, cell, "item", "task")
    assert before == row_id(RUN, {**CELL, "cell": "any name", "status": "ok"}, "item", "task")
    assert len({before, row_id(run, cell, "item", "t"), row_id(run, cell, "i", "task")}) == 3
    change(run, cell)
    assert row_id(run, cell, "item", "task") != before


def test_checkpoint_hash_reads_weights_config_and_processor(tmp_path: Any) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(OSError, match=r"no \.safetensors"):
        checkpoint_hash(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"1")
    seen = {checkpoint_hash(tmp_path)}
    for name in ("model.safetensors", "config.json", "tokenizer.json", "preprocessor_config.json"):
        (tmp_path / name).write_text(f"new {name}")
        seen.add(checkpoint_hash(tmp_path))
    assert len(seen) == 5
    (tmp_path / "README.md").write_text("no part of the model")
    assert checkpoint_hash(tmp_path) in seen
