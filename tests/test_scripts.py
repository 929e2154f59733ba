"""The scripts do what they say: files and JSON are checked, times are not."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent


def script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / name), *arguments],
        capture_output=True, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip


def positive(spread: dict[str, float]) -> bool:
    return 0 < spread["q1"] <= spread["median"] <= spread["q3"] and spread["n"] >= 1


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    path = tmp_path_factory.mktemp("bench") / "bench.json"
    only = "max_sum,visionzip_dominant,MergePlan.apply,fastv,pitome,todre"
    done = script(
        "bench_operators.py", "--quick", "--only", only, "--repeats", "1", "--json", str(path)
    )
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text()), done.stdout


def test_bench_times_operators_against_plain_transcriptions(bench: Any) -> None:
    report, printed = bench
    assert report["environment"]["threads"] == 1
    assert [row["name"] for row in report["operators"]] == [
        "max_sum", "MergePlan.apply", "visionzip_dominant",
    ]  # fmt: skip
    for row in report["operators"]:
        assert all(positive(row[name]) for name in ("ours_s", "plain_s", "ratio"))
        assert row["same"]
        assert row["name"] in printed


def test_bench_replays_methods_on_the_same_lengths(bench: Any) -> None:
    report, printed = bench
    methods = report["methods"]
    rows = {row["label"]: row for row in methods["rows"]}
    assert list(rows) == ["fastv", "pitome", "todre"]
    assert all(row["kept"] == 64 for row in rows.values())
    assert rows["fastv"]["visual_tokens"] == [576, 576, *[64] * 6]
    assert rows["todre"]["encoder_rows"] == [577] * 12
    assert rows["pitome"]["encoder_rows"][-1] == 65
    for row in rows.values():
        assert all(positive(row[name]) for name in ("method_s", "replay_s", "bare_s", "speedup"))
        assert row["label"] in printed


def test_bench_tells_how_time_and_memory_grow(bench: Any) -> None:
    report, printed = bench
    row, merged = report["growth"]
    assert (row["name"], merged["name"]) == ("max_sum", "MergePlan.apply")
    assert row["sizes"] == [64, 144]
    assert not row["left_out"]
    assert all(positive(spread) for spread in row["seconds"])
    # unit rows of 1024 numbers, and all pairs
    for n, held in zip((64, 144), row["bytes"]):
        assert 4 * (1024 * n + n * n) <= held < 1e6
    assert len(row["exponents"]) == 1
    assert "exponents" in printed


def test_bench_names_what_it_does_not_know(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.setattr(sys, "argv", ["bench_operators.py", "--only", "max_summ"])
    with pytest.raises(SystemExit) as stop:
        importlib.import_module("bench_operators").main()
    assert stop.value.code == 2
    assert "max_summ" in capsys.readouterr().err


@pytest.mark.full  # .ci/run ends with the same
def test_demo_goes_from_sweep_to_setting(tmp_path: Path) -> None:
    done = script(
        "demo.py", "--out", str(tmp_path), "--limit", "12", "--keep", "1/4",
        "--methods", "divprune",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for command in ("sweep --model mini", "report", "recommend", "run --model mini --setting"):
        assert f"$ tokprune {command}" in done.stdout
    setting = json.loads((tmp_path / "setting.json").read_text())
    assert setting["method"] in ("divprune", "random", "grid", "pool")
    assert "<svg" in (tmp_path / "sweep" / "report" / "report.html").read_text()
    for name in ("overlays.png", "scene.png", "kept.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) >= 192
            assert len(picture.convert("RGB").resize((64, 64)).getcolors(4096) or []) > 100


def test_growth_is_fitted_in_every_round_and_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    paths = tmp_path / "growth.json", tmp_path / "growth.svg"
    done = script(
        "bench_growth.py", "--shape", "small", "--sizes", "9,20,36", "--batches", "1,2",
        "--rounds", "6", "--methods", "divprune", "--json", str(paths[0]), "--plot", str(paths[1]),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(paths[0].read_text())
    assert report["rounds"] == 6
    for by, sizes in (("by_tokens", [9, 20, 36]), ("by_batch", [1, 2])):
        found = report[by]
        assert list(found) == ["unpruned", "divprune"]
        assert list(found["unpruned"]) == ["prefill"]
        assert set(found["divprune"]) == {"prefill", "selection"}
        for parts in found.values():
            for own in parts.values():
                assert own["sizes"] == sizes
                assert min(own["seconds"]) > 0
                assert len(own["between"]) == len(sizes) - 1
                told = own["exponent"]
                assert told["n"] == 6
                assert told["low"] <= told["median"] <= told["high"]
    assert "Milliseconds by visual tokens" in done.stdout
    drawn = paths[1].read_text()
    assert "<svg" in drawn
    assert str(tmp_path) not in drawn


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sizes", "9", "--batches", "1"], "one of them should be several numbers"),
        (["--sizes", "9,0"], "'9,0' should be whole numbers above 0"),
        (["--sizes", "9,9"], "names a number twice"),
        (["--keep", "1"], "--keep 1 should be between 0 and 1"),
        (["--rounds", "0"], "--rounds 0 should be at least 1"),
        (["--json", "nowhere/x.json"], "--json nowhere/x.json: no such folder"),
        (["--sizes", "9,16", "--batches", "1", "--methods", "divprun"], "Did you mean 'divprune'"),
    ],
)
def test_growth_names_what_does_not_fit(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.setattr(sys, "argv", ["bench_growth.py", "--shape", "small", *arguments])
    with pytest.raises(SystemExit) as stop:
        importlib.import_module("bench_growth").main()
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
