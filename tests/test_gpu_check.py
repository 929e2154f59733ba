"""The GPU check runs as a user runs it, on a CPU; what it writes holds whatever happens."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from methods_table import CORE

from tokprune.testing.checks.host_reads import can_find_host_reads

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = str(ROOT / "scripts")


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, f"{SCRIPTS}/{name}", *arguments],
        capture_output=True, text=True, cwd=ROOT, env=environment(),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def scripts_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    path = tmp_path_factory.mktemp("gpu") / "gpu.json"
    done = script("gpu_check.py", "--rehearse", "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    return path, json.loads(path.read_text()), done.stdout


# ------------------------------------------------------------------------------ the command


def test_a_rehearsal_runs_every_part(rehearsal: Any) -> None:
    _, data, printed = rehearsal
    assert data["status"] == "complete"
    assert data["rehearsal"] is True
    assert data["environment"]["torch"] == torch.__version__
    statuses = {part["name"]: part["status"] for part in data["parts"]}
    assert set(statuses.values()) <= {"ok", "skipped"}
    kinds = [part["kind"] for part in data["parts"]]
    order = list(dict.fromkeys(kinds))
    assert order == ["bench", "waits", "conformance", "kernels", "operators", "serving"]
    ran = {part["kind"] for part in data["parts"] if part["status"] == "ok"}
    assert {"bench", "conformance", "operators"} <= ran
    for part in data["parts"]:
        assert part["seconds"] >= 0
        assert part["name"] in printed
    assert "Speed-up over no compression" in printed
    assert "Prefill reaches 95 % of the ideal in" in printed
    assert max(map(len, printed.splitlines())) <= 160


def test_the_bench_of_a_rehearsal_has_what_the_bench_has(rehearsal: Any) -> None:
    _, data, _ = rehearsal
    results = [p["result"] for p in data["parts"] if p["kind"] == "bench" and "item" in p]
    names = {r["model"]["name"].removeprefix("random weights ") for r in results}
    assert names == {
        "llava-1.5-7b", "llava-next-7b", "qwen2.5-vl-7b", "qwen2.5-vl-7b-1792px",
        "qwen3-vl-8b-video",
    }  # fmt: skip
    (first, *_) = results
    assert [trial["method"] for trial in first["trials"]] == ["divprune", "fastv"]
    several = [r for r in results if r["settings"]["new_tokens"] == [2, 3]]
    assert several
    for answers in several:
        assert [point["new_tokens"] for point in answers["points"]] == [2, 3]
        assert all(point["unpruned_split"]["bound"]["median"] > 1 for point in answers["points"])


def test_the_checks_of_a_rehearsal_compare_with_the_oracle(rehearsal: Any) -> None:
    _, data, _ = rehearsal
    compared = [p["result"] for p in data["parts"] if p["name"].startswith("conformance/llava")]
    assert len(compared) == 4
    for found in compared:
        assert set(found) == {"divprune", "fastv", "pitome", "divprune, rectified"}
        for told in found.values():
            assert told["status"] == "equal"
            assert told["error"] <= told["allowed"] < told["contrast"]


def test_operators_of_a_rehearsal_grow(rehearsal: Any) -> None:
    _, data, _ = rehearsal
    grown = [part["result"] for part in data["parts"] if part["kind"] == "operators"]
    assert {"divprune", "k_center", "max_sum", "dpp_map"} <= {own["operator"] for own in grown}
    for own in grown:
        assert len(own["microseconds"]) == len(own["sizes"]) == 3
        assert min(own["microseconds"]) > 0


def test_a_run_that_is_stopped_leaves_what_it_had(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    run = subprocess.Popen(
        [sys.executable, f"{SCRIPTS}/gpu_check.py", "--rehearse", "--only", "operators", "--json",
         str(path)],
        stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment(),
    )  # fmt: skip
    assert run.stdout is not None
    first = run.stdout.readline()  # the first part is done
    assert "ok" in first
    run.send_signal(signal.SIGTERM)
    printed, _ = run.communicate(timeout=60)
    data = json.loads(path.read_text())
    assert data["parts"][0]["status"] == "ok"
    assert data["parts"][0]["result"]["operator"] == "divprune"
    # it may have been through before the signal came
    assert (run.returncode, data["status"]) in ((130, "interrupted"), (0, "complete"))
    assert data["status"] in printed
    assert [p.name for p in tmp_path.iterdir()] == ["gpu.json"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "speed"], "--only 'speed' should be among bench, checks, operators"),
        (["--minutes", "0"], "--minutes 0 should be above 0"),
        (["--json", "nowhere/gpu.json"], "--json nowhere/gpu.json: no such folder"),
        (["--json", "tests"], "--json tests is a folder"),
    ],
)
def test_bad_arguments_are_named(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    import gpu_check

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--rehearse", *arguments])
    with pytest.raises(SystemExit) as stop:
        gpu_check.main()
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_without_a_gpu_it_says_what_would_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import gpu_check

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--json", str(tmp_path / "gpu.json")])
    assert gpu_check.main() == 2
    assert "--rehearse" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------ its pieces


def test_a_failing_part_is_written_down_and_the_others_go_on(tmp_path: Path) -> None:
    from gpu_parts.journal import Journal, Skipped

    journal = Journal(tmp_path / "gpu.json", commit=None)
    with journal.part("bench", "bad") as own:
        own["result"] = {"partly": 1, "far": [float("inf"), 2.5]}
        raise RuntimeError("no such kernel")
    with journal.part("bench", "none"):
        raise Skipped("nothing to do")
    with journal.part("bench", "good"):
        now = json.loads((tmp_path / "gpu.json").read_text())["parts"]
        assert [part["status"] for part in now] == ["failed", "skipped", "running"]
    with pytest.raises(KeyboardInterrupt), journal.part("bench", "stopped"):
        raise KeyboardInterrupt
    data = json.loads((tmp_path / "gpu.json").read_text())
    bad, none, good, stopped = data["parts"]
    assert bad["error"] == "RuntimeError: no such kernel"
    assert bad["result"] == {"partly": 1, "far": [None, 2.5]}
    assert "RuntimeError: no such kernel" in bad["traceback"][-1]
    assert 1 < len(bad["traceback"]) <= 12
    assert str(ROOT) not in json.dumps(data)
    assert none["reason"] == "nothing to do"
    assert good["status"] == "ok"
    assert stopped["status"] == data["status"] == "interrupted"
    assert [part["name"] for part in journal.failed] == ["bad"]


def test_budgets_pass_on_what_is_left_over() -> None:
    from gpu_parts.budget import Budget

    now = 0.0
    budget = Budget(100.0, [1, 1, 2, 1], clock=lambda: now)
    assert budget.next() == 20
    now = 10.0  # done early
    assert budget.next() == 22.5
    now = 98.0
    assert budget.next() == 2  # too little for all that are left: in order
    now = 120.0  # far too late
    assert budget.next() == 0


def test_the_plan_has_every_method_and_the_wanted_ones_first() -> None:
    from gpu_parts.plan import WANTED, items

    from tokprune.bench.models import PRESETS
    from tokprune.methods import image_methods

    every = sorted(image_methods())
    plan = items(every)
    assert {method for item in plan for method in item.methods} == set(every)
    assert plan[0].methods == WANTED[:4]
    assert {item.shape for item in plan} <= set(PRESETS)
    assert {keep for item in plan if item.shape == "llava-1.5-7b" for keep in item.keeps} == {
        64, 128, 192,
    }  # fmt: skip


@pytest.fixture
def model_part(tmp_path: Path) -> Any:
    """A journal, an item of two methods, and tiny models."""
    from gpu_parts.journal import Journal
    from gpu_parts.models import Models
    from gpu_parts.plan import Item

    item = Item("x", "llava-1.5-7b", 576, ("divprune", "pool", "grid"), (1 / 7,), 1.0)
    return (
        Journal(tmp_path / "gpu.json", commit=None), item.rehearsed(3, 1),
        Models(torch.device("cpu"), tiny=True),
    )  # fmt: skip


def test_a_method_that_fails_does_not_take_its_group_along(
    model_part: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu_parts import bench_part

    journal, item, models = model_part
    real = bench_part._bench

    def bench(item: Any, models: Any, methods: tuple[str, ...], *rest: Any) -> Any:
        if "divprune" in methods:
            raise RuntimeError("broken")
        return real(item, models, methods, *rest)

    monkeypatch.setattr(bench_part, "_bench", bench)
    bench_part.run_item(item, models, 60.0, journal)
    found = {part["name"].split("/")[-1]: part for part in journal.parts}
    assert list(found["model"]["result"]["refused"]) == ["pool@0.143"]
    assert found["divprune+grid@0.143"]["status"] == "failed"
    assert found["divprune@0.143"]["status"] == "failed"
    assert found["grid@0.143"]["status"] == "ok"
    assert [t["method"] for t in found["grid@0.143"]["result"]["trials"]] == ["grid"]


def test_what_the_time_did_not_reach_is_named(model_part: Any) -> None:
    from gpu_parts import bench_part

    journal, item, models = model_part
    bench_part.run_item(item, models, 1e-9, journal)
    bench_part.run_item(item, models, 0.0, journal)
    *_, rest, whole = journal.parts
    assert rest["reason"] == "the time was over before divprune+grid@0.143"
    assert whole["reason"] == "the time was over"


def test_conformance_sees_a_wrong_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle that hides other keys than the method dropped is far away."""
    from gpu_parts import conformance

    for dtype, kernel in ((torch.float32, "math"), (torch.bfloat16, "flash")):
        bench = conformance._Bench("llava-1.5", torch.device("cpu"), dtype, kernel, False)
        assert bench.check(*CORE["fastv"])["status"] == "equal"

        def other(value: Any, known: Any = None, real: Any = conformance.on_cpu) -> Any:
            copied = real(value, known)
            for layer in getattr(copied, "layers", []) if known is None else []:
                if hasattr(layer, "column"):  # other tokens than those of the trace
                    seen = layer.segment >= 0
                    layer.column = layer.column.masked_scatter(
                        seen, (layer.column - layer.column[seen].min() + 4)[seen].flip(0) % 30 + 4
                    )
            return copied

        with monkeypatch.context() as patch:
            patch.setattr(conformance, "on_cpu", other)
            assert bench.check(*CORE["fastv"])["status"] == "wrong"


def test_a_copy_of_a_trace_is_on_the_cpu_and_apart() -> None:
    from gpu_parts.conformance import on_cpu

    from tokprune.testing.generated import Entering

    own = Entering({0: torch.ones(2, dtype=torch.bfloat16), 1: torch.arange(3)})
    copied = on_cpu(own)
    assert copied is not own
    assert copied.layers[0].dtype == torch.float32
    assert copied.layers[1].dtype == torch.long
    assert own.layers[0].dtype == torch.bfloat16


def test_a_kernel_that_the_model_cannot_have_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CPUs have no memory-efficient kernel."""
    from gpu_parts import conformance
    from gpu_parts.journal import Journal

    journal = Journal(tmp_path / "gpu.json", commit=None)
    monkeypatch.setattr(conformance, "ON_CPU", ((torch.float32, "efficient", False),))
    conformance.run_conformance({}, torch.device("cpu"), 9.0, journal)
    assert [part["status"] for part in journal.parts] == ["skipped"] * 2
    assert "cannot have this kernel" in journal.parts[0]["reason"]
    bench = conformance._Bench("llava-1.5", torch.device("cpu"), torch.float32, "math", False)
    bench.kernel = "efficient"
    assert bench.check(*CORE["divprune"])["status"] == "no kernel"


def test_a_method_that_raises_is_wrong_and_the_others_go_on(tmp_path: Path) -> None:
    from gpu_parts import conformance
    from gpu_parts.journal import Journal

    journal = Journal(tmp_path / "gpu.json", commit=None)
    cases = {"bad": ("fastv", {"keep": 7, "prune_before": 99}), "good": CORE["divprune"]}
    conformance.run_conformance(cases, torch.device("cpu"), 99.0, journal)
    for part in journal.parts:
        assert part["status"] == "failed"
        assert part["error"] == "AssertionError: bad: see the result"
        assert "99" in part["result"]["bad"]["error"]
        assert part["result"]["good"]["status"] == "equal"


@pytest.mark.skipif(
    not can_find_host_reads(), reason="transformers 4 itself reads the placeholders"
)
def test_waits_beyond_those_of_the_unpruned_model_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA's debug mode stood in for: it warns, or raises, where something waits."""
    import warnings

    from gpu_parts import waits
    from gpu_parts.journal import Journal

    said = "called a synchronizing CUDA operation"

    def forward(method: Any, device: torch.device, mode: str) -> None:
        waiting = ["model.py"] + ["tokprune/engine/entry.py"] * (
            method is not None and method.name == "divprune"
        )
        if mode == "error":
            raise RuntimeError(said)
        for name in waiting:
            warnings.warn_explicit(said, UserWarning, str(ROOT / name), 7)

    monkeypatch.setattr(waits, "_forward", forward)
    journal = Journal(tmp_path / "gpu.json", commit=None)
    cases = {name: CORE[name] for name in ("divprune", "grid", "todre")}
    waits.run_waits(cases, torch.device("cpu"), 60.0, journal)
    unpruned, methods = journal.parts
    assert unpruned["result"]["places"] == ["model.py:7"]
    assert "raise RuntimeError(said)" in unpruned["result"]["error_mode"]
    found = methods["result"]
    assert found["divprune"]["status"] == "waits"
    assert "tokprune/engine/entry.py:7" in found["divprune"]["places"]
    assert found["grid"]["status"] == "never waits"
    assert found["todre"]["status"] == "adaptive"
    assert methods["status"] == "failed"
    assert methods["error"].startswith("AssertionError: divprune wait")


def test_models_make_room_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu_parts.models import Models

    import tokprune.bench.models as shapes

    made: list[str] = []
    models = Models(torch.device("cpu"), tiny=False)

    def full(name: str, **options: Any) -> str:
        if models._made:
            raise MemoryError
        made.append(name)
        return name

    monkeypatch.setattr(shapes, "random_model", full)
    assert models.get("qwen2.5-vl-7b-1792px") == models.get("qwen2.5-vl-7b") == "qwen2.5-vl-7b"
    assert models.get("llava-next-7b") == "llava-next-7b"
    assert made == ["qwen2.5-vl-7b", "llava-next-7b"]
    assert list(models._made) == ["llava-next-7b"]
    assert models.picture("qwen3-vl-8b-video")[1] == 64
    assert models.picture("llava-next-7b")[0].size == (672, 672)


# ------------------------------------------------------------------------------ the README's table


def test_speed_table_stands_between_its_markers(rehearsal: Any, tmp_path: Path) -> None:
    path, data, _ = rehearsal
    readme = tmp_path / "README.md"
    shutil.copy(ROOT / "README.md", readme)
    refused = script("speed_table.py", str(path), "--readme", str(readme))
    assert refused.returncode == 2
    assert "rehearsal" in refused.stderr
    for _ in range(2):  # the second time it replaces its own
        done = script("speed_table.py", str(path), "--readme", str(readme), "--allow-rehearsal")
        assert done.returncode == 0, done.stderr
    text, before = readme.read_text(), (ROOT / "README.md").read_text()
    begin, end = (f"<!-- speed table: {word} -->" for word in ("begin", "end"))
    inside = text.split(begin)[1].split(end)[0]
    assert inside.startswith("\n**Rehearsal on tiny models")
    assert "total, 2 new" in inside
    assert "| llava-next-7b (" in inside
    answers = [r for r in inside.splitlines() if "next-7b" in r and "–" not in r]
    assert answers
    assert all(row.count("×") == 4 for row in answers)
    assert data["environment"]["device"] in inside
    for n in (0, 1):  # the rest of the page is as it was
        outside = [page.split(mark)[n] for page in (text, before)
                   for mark in (begin if n == 0 else end,)]  # fmt: skip
        assert outside[0] == outside[1]


def test_speed_table_says_what_is_wrong(tmp_path: Path, rehearsal: Any) -> None:
    path, _, _ = rehearsal
    (tmp_path / "none.md").write_text("no markers")
    (tmp_path / "other.json").write_text("{}")
    for arguments, said in (
        ([str(tmp_path / "other.json")], "should be a JSON of gpu_check.py"),
        ([str(path), "--allow-rehearsal", "--readme", str(tmp_path / "none.md")], "once each"),
    ):
        done = script("speed_table.py", *arguments)
        assert done.returncode == 2
        assert said in done.stderr
    assert (tmp_path / "none.md").read_text() == "no markers"
