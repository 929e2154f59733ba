"""Run folders of the release before (``old_run/``, schema 1): read, not resumed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tokprune import FastV
from tokprune.eval.published.reproduce import read_figures
from tokprune.eval.recommend import recommend
from tokprune.eval.report import build_report
from tokprune.eval.sweep import read_run
from tokprune.eval.sweep.resume import earlier_run
from tokprune.methods.setting import load_setting

OLD = Path(__file__).parent / "old_run"


def test_an_old_folder_is_read_by_the_names_of_today() -> None:
    run = read_run(OLD)
    assert list(run.trials) == ["none", "fastv@288", "downsample@288"]
    assert {trial["variant"] for trial in run.trials.values()} == {"none", "fastv", "downsample"}
    assert run.trials["fastv@288"]["budget_text"] == "288"
    assert (len(run.rows), run.stale, run.duplicates) == (27, 0, 0)
    assert len(run.rows_of("fastv@288")) == 9
    assert run.latency is not None
    assert set(run.latency["trials"]) == {"none", "fastv@288"}
    assert {record["trial"] for record in run.overlays()} == {"fastv@288"}


def test_an_old_folder_is_reported_recommended_and_compared(tmp_path: Path) -> None:
    report = build_report(OLD, tmp_path, draws=200)
    assert list(report.analysis.series()) == ["fastv", "downsample"]
    setting = recommend(OLD, max_tokens=288, same_questions=True).setting
    assert (setting["schema"], setting["method"]) == (1, "fastv")
    with pytest.warns(FutureWarning, match="'layer' of fastv is called 'prune_before' now"):
        method = load_setting(setting)
    assert method == FastV(keep=288, prune_before=2, positions="preserve")
    with pytest.warns(FutureWarning):
        options = read_figures(OLD)._options(read_run(OLD).trials["fastv@288"])
    assert options["prune_before"] == 2


def test_an_old_folder_is_not_resumed(tmp_path: Path) -> None:
    shutil.copytree(OLD, tmp_path / "run")
    with pytest.raises(ValueError, match=r"older schema 1, this version writes 2: .*--fresh"):
        earlier_run(tmp_path / "run", 27)
