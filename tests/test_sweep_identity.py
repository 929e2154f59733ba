"""The identity of rows: properties."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokprune.eval.sweep.identity import canonical, checkpoint_hash, digest, row_id

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


RUN = {"schema": 2, "model": {"hash": "m"}, "benchmark": {"version": "v"}, "code": "c"}
TRIAL = {"variant": "todre", "options": {"keep": 9}, "dtype": "float32", "batch_size": 4, "seed": 0}


@pytest.mark.parametrize(
    "change",
    [
        lambda run, trial: run["model"].update(hash="n"),
        lambda run, trial: run["benchmark"].update(version="w"),
        lambda run, trial: run.update(code="d"),
        lambda run, trial: trial.update(variant="fastv"),
        lambda run, trial: trial["options"].update(keep=10),
        lambda run, trial: trial["options"].update(tau=0.1),
        lambda run, trial: trial.update(dtype="bfloat16"),
        lambda run, trial: trial.update(batch_size=1),
        lambda run, trial: trial.update(seed=1),
    ],
)
def test_everything_that_can_change_an_answer_changes_the_identity(change: Any) -> None:
    run, trial = copy.deepcopy(RUN), copy.deepcopy(TRIAL)
    before = row_id(run, trial, "item", "task")
    assert before == row_id(RUN, {**TRIAL, "trial": "any name", "status": "ok"}, "item", "task")
    assert len({before, row_id(run, trial, "item", "t"), row_id(run, trial, "i", "task")}) == 3
    change(run, trial)
    assert row_id(run, trial, "item", "task") != before


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
