"""Sweeps on a Ray cluster: the same rows, whatever is lost on the way. The cluster has two nodes
on this machine and runs in a process of its own, with loopback only where that can be."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import sweep_case as case

from tokprune.cli import app
from tokprune.eval.benchmarks.base import Item
from tokprune.eval.sweep.harness import OpenTrial, Step, TrialsFailedError
from tokprune.eval.sweep.on_ray import crew as crew_module
from tokprune.eval.sweep.on_ray.cluster import LostError, needed, places
from tokprune.eval.sweep.on_ray.crew import MOST_LOST, Crew, Orders
from tokprune.eval.sweep.on_ray.work import MOST_LOSSES, Work
from tokprune.eval.sweep.trials import Trial

TESTS = Path(__file__).parent
spec = importlib.util.find_spec("ray")
with_ray = pytest.mark.skipif(
    spec is None or spec.origin is None, reason="needs ray: pip install 'tokprune[ray]'"
)

# ---------------------------------------------------------------------- what is to be done

ITEMS = [Item(f"q{i}", "all", "image", "?", ("yes",)) for i in range(7)]


def task(name: str, missing: Any = range(7), **entry: Any) -> OpenTrial:
    made = {"trial": name, "noise": False, "status": "ok", "batch_size": 3, **entry}
    return OpenTrial(Trial(made), {f"q{i}": f"{name}-{i}" for i in missing})


def names(shard: Any) -> list[str]:
    return [task.trial.id for task in shard.open]


def test_batches_are_those_of_a_single_process() -> None:
    noise = task("none.batch1", (0, 6), noise=True, batch_size=1)
    work = Work([noise, task("none", (5, 6)), task("fastv@9")], ITEMS, 3)
    told = [(shard.start, shard.stop, names(shard)) for shard in work.queue]
    assert told == [
        (0, 1, ["none.batch1"]), (6, 7, ["none.batch1"]),
        (0, 3, ["fastv@9"]), (3, 6, ["none", "fastv@9"]), (6, 7, ["none", "fastv@9"]),
    ]  # fmt: skip
    assert [list(task.rows) for task in work.queue[3].open] == [["q5"], ["q3", "q4", "q5"]]
    assert work.pieces == 7


def test_who_has_nothing_left_takes_half_of_what_another_has() -> None:
    work = Work([task(name) for name in "abcde"], ITEMS[:3], 3)
    first = work.take()
    assert first is not None
    first.open.popleft()  # in flight
    second = work.take()
    assert (names(first), names(second)) == (["b", "c"], ["d", "e"])
    third = work.take()
    assert third is not None
    assert (third.start, third.stop, len(third.open)) == (0, 3, 1)
    for shard in (first, second, third):
        shard.open.clear()
    assert work.take() is None
    assert not work.done
    for shard in (first, second, third):
        work.finish(shard)
    assert work.done


def test_a_batch_that_workers_die_of_is_given_up_alone() -> None:
    work = Work([task("a"), task("b")], ITEMS, 3)
    for attempt in range(1, MOST_LOSSES + 1):
        shard = work.take()
        assert shard is not None
        assert (shard.start, names(shard)) == (0, ["a", "b"])
        assert work.put_back(shard, shard.open.popleft(), "died") == (attempt < MOST_LOSSES)
    assert [shard.questions for shard, _ in work.given_up] == ["q0, q1, q2"]
    assert [shard.start for shard in work.queue] == [3, 6]


def test_a_trial_that_finds_no_room_is_dropped_everywhere() -> None:
    noise = task("none.bfloat16", noise=True)
    work = Work([noise, task("none")], ITEMS, 3)
    shard = work.take()
    assert shard is not None
    flying = shard.open.popleft()
    noise.trial.entry["status"] = "unreachable"
    work.drop("none.bfloat16")
    assert [names(shard) for shard in work.queue] == [["none"]] * 3
    assert work.put_back(shard, flying, "died")
    assert len(work.queue) == 3


def test_places_are_counted_node_by_node() -> None:
    nodes = [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 3.0}, {}]
    assert places(nodes, needed("cpu", 2)) == 4 + 1
    assert places(nodes, needed("cuda", None)) == 2
    assert places(nodes, needed("cpu", 16)) == 0


class Call:
    """A remote method of a fake actor; its call runs when the crew waits for it."""

    def __init__(self, own: Any) -> None:
        self.remote = lambda *args: functools.partial(own, *args)


class FakeCluster:
    """Starts workers of a class in this process."""

    def __init__(self, kind: Any) -> None:
        self.kind, self.running = kind, 0

    def start(self, device: str, threads: int | None) -> Any:
        self.running += 1
        worker = self.kind()
        return SimpleNamespace(**{n: Call(getattr(worker, n)) for n in ("who", "load", "answer")})

    def end(self, actor: Any) -> None:
        self.running -= 1

    def wait(self, calls: Any, seconds: float) -> Any:
        return calls[:1] if self.kind.runs else []

    def result(self, call: Any) -> Any:
        return call()


class Good:
    runs = True

    def who(self) -> dict[str, str]:
        return {"address": "10.0.0.5", "tokprune": "1", "code": "c"}

    def load(self, *_: Any) -> dict[str, str]:
        return {"model": "m"}

    def answer(self, task: OpenTrial, start: int, stop: int) -> Any:
        return Step([{"item": name} for name in task.rows])


def crew(kind: Any, size: int = 2) -> tuple[FakeCluster, Crew]:
    cluster, work = FakeCluster(kind), Work([task("a"), task("b")], ITEMS, 3)
    orders = Orders(None, (set(), set()), "cpu", 1, {"code": "c", "model": "m"})  # type: ignore[arg-type]
    return cluster, Crew(cluster, work, orders, size)  # type: ignore[arg-type]


def test_every_answer_comes_once_whatever_dies() -> None:
    class Frail(Good):
        deaths = 0

        def answer(self, *args: Any) -> Any:
            Frail.deaths += 1
            if Frail.deaths % 3 == 0:
                raise LostError("killed")
            return super().answer(*args)

    cluster, own = crew(Frail)
    steps = list(own.run())
    rows = [row["item"] for step in steps for row in step.rows]
    assert sorted(rows) == sorted([item.id for item in ITEMS] * 2)
    assert sum("10.0.0.5 was lost (killed)" in (step.note or "") for step in steps) == 2
    assert cluster.running == 2


def test_workers_that_only_die_are_not_started_for_ever() -> None:
    class Dead(Good):
        started = 0

        def load(self, *_: Any) -> Any:
            Dead.started += 1
            raise LostError("out of memory")

    with pytest.raises(TrialsFailedError, match=r"no worker is left.*10.0.0.5: out of memory"):
        list(crew(Dead)[1].run())
    assert Dead.started == 2 * MOST_LOST


def test_a_batch_that_workers_die_of_is_named_and_all_others_answered() -> None:
    class Poisoned(Good):
        def answer(self, task: OpenTrial, start: int, stop: int) -> Any:
            if start == 3:
                raise LostError("killed")
            return super().answer(task, start, stop)

    steps = crew(Poisoned)[1].run()
    rows: list[str] = []
    with pytest.raises(
        TrialsFailedError, match=r"^3 workers .* q3, q4, q5 \(last [ab] on 10.0.0.5"
    ):
        for step in steps:
            rows += [row["item"] for row in step.rows]
    assert sorted(rows) == sorted(["q0", "q1", "q2", "q6"] * 2)


def test_a_cluster_without_room_is_not_waited_for_for_ever(monkeypatch: Any) -> None:
    class Pending(Good):
        runs = False

    monkeypatch.setattr(crew_module, "PATIENCE", 0.0)
    with pytest.raises(TrialsFailedError, match="no room for a worker"):
        list(crew(Pending)[1].run())


@pytest.mark.parametrize(
    ("method", "told", "words"),
    [
        ("who", {"address": "10.0.0.5", "code": "d"}, "10.0.0.5 has another code (d) than"),
        ("load", {"model": "n"}, "10.0.0.5 has another model (n) than this process (m)"),
        ("load", OSError("no such model"), "the worker on 10.0.0.5: no such model"),
    ],
)
def test_nodes_with_something_else_are_named(method: str, told: Any, words: str) -> None:
    def say(*_: Any) -> Any:
        if isinstance(told, Exception):
            raise told
        return told

    with pytest.raises(ValueError, match=re.escape(words)):
        list(crew(type("Other", (Good,), {method: say}))[1].run())


def test_without_ray_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit) as caught:
        app(["sweep", "--model", "mini", "--out", str(tmp_path / "run"), "--executor", "ray"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "Error: executor=ray needs ray, which is not installed: pip install 'tokprune[ray]'"
    )
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------ a cluster


def without_network(command: list[str]) -> list[str]:
    """The command in a network of its own, where that is permitted."""
    alone = ["unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    try:
        subprocess.run([*alone, "true"], check=True, capture_output=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return command
    return [*alone, *command]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What happened in the scenes of ray_case.py."""
    home = tmp_path_factory.mktemp("ray")
    case.make_model(home / "model", layers=6)
    case.make_benchmark(home / "bench")
    logs = tempfile.mkdtemp(prefix="ray")  # a short path: sockets lie in it
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "RAY_TMPDIR": logs, "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS), *filter(None, sys.path)]),
    }  # fmt: skip
    environment.pop("RAY_ADDRESS", None)
    command = without_network([sys.executable, str(TESTS / "ray_case.py"), str(home)])
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        said, _ = process.communicate(timeout=400)
        assert process.returncode == 0, said[-3000:]
        yield json.loads((home / "outcomes.json").read_text())
    finally:
        family = (
            psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        )
        process.send_signal(signal.SIGKILL)
        for other in family:  # of a test that ran out of time: daemons outlive their parent
            if other.is_running():
                other.kill()
        shutil.rmtree(logs, ignore_errors=True)


@with_ray
@pytest.mark.slow
def test_rows_survive_a_killed_worker_and_a_removed_node(outcomes: dict[str, Any]) -> None:
    told = outcomes["losses"]
    assert told["equal"]  # every field of every row, evidence included, but for times
    assert told["rows"] == [35, 35, 35]  # five trials (two of them the noise floor), 7 questions
    assert told["twice"] == 0
    assert told["overlays"] == [6, True]
    assert told["finished"]
    assert told["timed"] == ["fastv@9", "none", "todre@9"]  # by a model loaded again
    assert told["gates"][0] == told["gates"][1]
    assert told["pieces"] == 7 + 3 + 3 * 3  # batches of one, of three, and three trials on three
    assert told["repeated"] <= 2  # what the killed worker and the removed node had in hand
    assert told["said"][0] == "2 workers on Ray, 1 core each"
    # and at times a third, which Ray had started on the node while that went
    assert sum("was lost" in line for line in told["said"]) >= 2


@with_ray
@pytest.mark.slow
def test_a_folder_goes_from_one_executor_to_the_other(outcomes: dict[str, Any]) -> None:
    told = outcomes["interrupted"]
    begun, continued, whole = told["counts"]
    assert 0 < begun < continued < whole == 14
    assert told["equal"]
    assert told["twice"] == 0
    assert told["sigterm"]  # Ray's own handler is gone again
    assert not told["connected"]


@with_ray
@pytest.mark.slow
@pytest.mark.parametrize(
    ("scene", "words"),
    [
        ("poisoned", ["TrialsFailedError: 2 workers were lost", "questions q0, q1, q2 (last none"]),
        ("elsewhere", ["ValueError: the worker on 10.0.0.7 has another tokprune (0.0.1)"]),
        ("too many threads", ["ValueError", "has room for a worker (3 cores; nodes have 1 core)"]),
        ("nobody there", ["ConnectionError: address='127.0.0.1:9': ", "should be host:port"]),
        ("no address", ["ConnectionError: address='nowhere': ", "should be host:port"]),
    ],
)
def test_what_cannot_be_is_said(outcomes: dict[str, Any], scene: str, words: list[str]) -> None:
    for word in words:
        assert word in outcomes[scene]
    assert "\n" not in outcomes[scene]
