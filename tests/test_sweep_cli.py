"""``tokprune sweep`` as installed: options, bad input, kills at any moment."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sweep_case as case
import yaml

from tokprune.cli import app
from tokprune.eval.sweep import read_run, run_sweep


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli")
    case.make_model(root / "model", layers=6)
    case.make_benchmark(root / "bench")
    return root


def arguments(home: Path, out: Path, *more: Any) -> list[str]:
    """A sweep of two methods at one budget, 3 questions a batch, three tokens an answer."""
    return [
        str(part) for part in (
            "sweep", "--model", home / "model", "--benchmark", home / "bench" / "small.jsonl",
            "--methods", "fastv,random", "--keep", "1/2", "--no-controls", "--no-noise",
            "--no-latency", "--batch-size", 3, "--max-new-tokens", 3, "--device", "cpu",
            "--seeds", "0", "--out", out, *more,
        )
    ]  # fmt: skip


def command(*parts: Any) -> list[str]:
    return [str(Path(sys.executable).with_name("tokprune")), *map(str, parts)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must be refused; gives its one error line."""

    def call(*parts: Any) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            app([*map(str, parts)])
        out, err = capsys.readouterr()
        assert (caught.value.code, out) == (2, ""), err
        lines = [line for line in err.strip().splitlines() if not line.startswith("[transformers]")]
        assert len(lines) == 1, err
        assert lines[0].startswith("Error: ")
        return lines[0]

    return call


def test_installed_command_sweeps_resumes_and_exports(home: Path, tmp_path: Path) -> None:
    out, table = tmp_path / "run", tmp_path / "rows.parquet"
    call = command(*arguments(home, out, "--parquet", table, "--seeds", "0,1"))
    done = subprocess.run(call, capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out}: 28 answers in 4 trials\n"
    assert "answers: 28/28" in done.stderr
    run = read_run(out)
    assert run.info["finished"]
    assert run.info["command"].startswith("tokprune sweep --model")
    assert set(run.trials) == {"none", "fastv@18", "random@18", "random@18.s1"}
    assert table.stat().st_size > 1000
    module = [sys.executable, "-m", "tokprune", *call[1:]]
    again = subprocess.run(module, capture_output=True, text=True, env=environment(), timeout=300)
    assert again.returncode == 0, again.stderr
    assert "28 of 28 answers are there already" in again.stderr
    assert read_run(out).rows == run.rows


def test_config_file_and_options_before_it(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {
        "model": str(home / "model"), "benchmark": str(home / "bench" / "small.jsonl"),
        "methods": ["fastv", {"name": "random", "positions": "preserve"}], "keep": [9, "1/2"],
        "controls": False, "noise": False, "latency": False, "batch_size": 4, "limit": 3,
        "max_new_tokens": 2, "device": "cpu",
    }  # fmt: skip
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit) as caught:
        app([
            "sweep", "--config", str(tmp_path / "sweep.yaml"), "--keep", "18", "--out",
            str(tmp_path / "run"), "--option", "fastv.rows=text",
        ])  # fmt: skip
    assert caught.value.code == 0, capsys.readouterr().err
    run = read_run(tmp_path / "run")
    random = "random+positions=preserve@18"  # three draws of it, since one is luck
    assert set(run.trials) == {
        "none", "fastv+rows=text@18", random, f"{random}.s1", f"{random}.s2"
    }  # fmt: skip
    assert len(run.rows) == 15


def test_bad_input_is_one_line_before_any_work(
    home: Path, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    base = arguments(home, out)

    def changed(*more: Any) -> list[str]:
        return [*base, *map(str, more)]

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    with monkeypatch.context() as patch:
        patch.setattr("tokprune.eval.sweep.loaded_model.load", never)
        assert "Missing" in refused("sweep", "--out", out) or "--model is missing" in refused(
            "sweep", "--out", out
        )
        assert "--out is missing" in refused("sweep", "--model", home / "model")
        for more, message in [
            (["--methods", "fastvv"], "Did you mean 'fastv'"),
            (["--methods", "fastv,,random"], "separated by commas"),
            (["--methods", "fastv:prune_befor=2"], "Did you mean 'prune_before'"),
            (["--keep", ""], "at least one"),
            (["--keep", "64,"], "at least one"),
            (["--keep", "many"], "should be a count"),
            (["--keep", "0"], "at least 1 token"),
            (["--benchmark", "minni"], "Did you mean 'mini'"),
            (["--benchmark", tmp_path / "none.jsonl"], "no such file"),
            (["--tasks", "cuont"], "task 'cuont' is unknown"),
            (["--tasks", ""], "at least one"),
            (["--split", "train"], "split='train' is unknown"),
            (["--seeds", "one"], "whole numbers"),
            (["--match", "median"], "one of mean, last"),
            (["--limit", "0"], "'--limit'"),
            (["--option", "fastv.prune_befor=2"], "Did you mean 'prune_before'"),
            (["--option", "todre.tau=0.1"], "not among the swept"),
            (["--config", tmp_path / "none.yaml"], "No such file"),
            (["--out", home / "bench" / "small.jsonl"], "is a file"),
            (["--out", home / "bench"], "holds other files"),
            (["--parquet", tmp_path / "none" / "x.parquet"], "no such folder"),
            (["--model", tmp_path / "none"], "no such folder"),
        ]:  # fmt: skip
            assert message in refused(*changed(*more)), more
    assert not out.exists()
    assert "37 is more than the 36 visual tokens" in refused(*changed("--keep", 37))
    assert not out.exists(), "a refused sweep leaves a folder"
    if os.geteuid() != 0:
        locked = tmp_path / "locked"
        locked.mkdir(mode=0o500)
        assert "cannot be" in refused(*changed("--out", locked / "run"))


def test_help_needs_no_torch() -> None:
    code = (
        "import sys, tokprune.cli\n"
        "try: tokprune.cli.app(['sweep', '--help'])\n"
        "except SystemExit as e: assert not e.code\n"
        "assert not {'torch', 'transformers', 'PIL', 'yaml'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


# -------------------------------------------------------------------------------- kills

#: the sweep with a pause before every write, so that kills hit every stage of it
_SLOW = """
import random, sys, time
from tokprune.eval.sweep.store import Store
real = Store.append
def append(store, rows):
    time.sleep(random.Random(len(store.rows)).uniform(0.0, 0.01))
    real(store, rows)
Store.append = append
from tokprune.cli import app
app(sys.argv[1:])
"""


def start(home: Path, out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _SLOW, *arguments(home, out)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip


def rows_in(out: Path) -> int:
    path = out / "rows.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_rows(process: subprocess.Popen[str], out: Path, wanted: int) -> None:
    """Until the file holds that many lines, or the process has ended."""
    while process.poll() is None and rows_in(out) < wanted:
        time.sleep(0.002)


def sweep_in_child(home: Path, out: Path) -> int:
    """Process id of a fork that runs the sweep: no time goes into imports."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:  # pragma: no cover (not in this process)
        run_sweep(case.settings(home / "model", home / "bench" / "small.jsonl", out))
        code = 0
    finally:
        os._exit(code)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its victims")
def test_ten_kills_lose_nothing_and_duplicate_nothing(home: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "killed"
    start_of = time.monotonic()
    assert os.waitpid(sweep_in_child(home, whole), 0)[1] == 0
    takes = time.monotonic() - start_of
    total = rows_in(whole)
    chance = random.Random(7)
    before = landed = 0
    for _ in range(10):
        child = sweep_in_child(home, out)
        # anywhere from loading over matching to some batches after this start
        wanted, gone = before + chance.choice([0, 0, 1, 3, 4]), 0
        while rows_in(out) < wanted and not gone:
            gone = os.waitpid(child, os.WNOHANG)[0]
            time.sleep(0.001)
        time.sleep(chance.uniform(0, takes / 20 if wanted > before else takes / 2))
        if not gone:
            os.kill(child, signal.SIGKILL)
            landed += os.waitpid(child, 0)[1] == signal.SIGKILL
        assert rows_in(out) >= before, "a row was lost"
        before = rows_in(out)
    assert landed >= 3, "most kills came too late to test anything"
    assert os.waitpid(sweep_in_child(home, out), 0)[1] == 0
    lines = (out / "rows.jsonl").read_bytes().splitlines()
    names = [json.loads(line)["row"] for line in lines]
    assert len(names) == len(set(names)) == total
    assert case.answers(read_run(out)) == case.answers(read_run(whole))


@pytest.mark.skipif(os.name == "nt", reason="no SIGTERM to catch")
def test_termination_is_clean_and_resumable(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(home, out)
    wait_for_rows(process, out, 7)  # an interrupted append is undone: earlier ones must stay
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert "Run the same command again to go on" in err
    part = read_run(out)
    assert not part.info["finished"]
    assert 1 <= len(part.rows) < 21
    again = start(home, out)
    assert again.wait(300) == 0, again.communicate()
    run = read_run(out)
    assert run.info["finished"]
    assert run.rows[: len(part.rows)] == part.rows
    assert len(run.rows) == 21
