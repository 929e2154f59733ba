"""Sweeps on a Ray cluster of two nodes on this machine; run in a process of its own.

    python tests/ray_case.py FOLDER

FOLDER holds a model and a benchmark of :mod:`sweep_case`. What happened is written to
``outcomes.json`` in it, for ``test_sweep_ray.py`` to judge.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import ray
import sweep_case as case
import torch
from ray.cluster_utils import Cluster

from tokprune.eval.sweep import read_run, run_sweep
from tokprune.eval.sweep.harness import TrialsFailedError
from tokprune.eval.sweep.on_ray import cluster as cluster_module
from tokprune.eval.sweep.on_ray import work as work_module
from tokprune.eval.sweep.on_ray.worker import Worker
from tokprune.eval.sweep.progress import Progress

STORE = 80 * 2**20
HOME = Path(sys.argv[1])


class Diary(Progress):
    """Remembers what was said, and does something when so many answers are there."""

    def __init__(self, at: dict[int, Callable[[], None]] | None = None) -> None:
        self.said: list[str] = []
        self.at, self.answers, self.stage = dict(at or {}), 0, ""

    def say(self, text: str) -> None:
        self.said.append(text)

    def start(self, name: str, total: int) -> None:
        self.stage = name

    def advance(self, steps: int) -> None:
        if self.stage != "answers":
            return
        self.answers += steps
        for number in [n for n in self.at if n <= self.answers]:
            self.at.pop(number)()


class Written(Worker):
    """A worker that puts down what it starts to answer, and takes long enough to be caught."""

    def answer(self, task: Any, start: int, stop: int) -> Any:
        with (HOME / "asked").open("a") as file:
            file.write(f"{task.trial.id} {start}\n")
        time.sleep(0.2)
        return super().answer(task, start, stop)


class Poisoned:
    """A worker without a model that dies of what it is asked."""

    def __init__(self, *_: Any) -> None: ...

    def who(self) -> dict[str, str]:
        return {"address": "127.0.0.1"}

    def load(self, *_: Any) -> dict[str, str]:
        return {}

    def answer(self, *_: Any) -> Any:
        os._exit(1)


class Elsewhere(Poisoned):
    """A worker on a node with another release."""

    def who(self) -> dict[str, str]:
        return {"address": "10.0.0.7", "tokprune": "0.0.1", "code": "0" * 64}


@contextmanager
def workers(kind: type) -> Iterator[None]:
    """Sweeps start workers of this class."""
    cluster_module.Worker = kind  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        cluster_module.Worker = Worker  # type: ignore[misc]


def settings(out: str, **changes: Any) -> Any:
    few: dict[str, Any] = {"methods": ("fastv", "todre"), "keep": (9,), "noise": True}
    if changes.get("executor") == "ray":
        few["address"] = ADDRESS
    model, benchmark = HOME / "model", HOME / "bench" / "small.jsonl"
    return case.settings(model, benchmark, HOME / out, **{**few, **changes})


def kill_worker_of(node: Any) -> None:
    """SIGKILL to the process that answers on a node."""
    (raylet,) = node.all_processes["raylet"]
    children = psutil.Process(raylet.process.pid).children(recursive=True)
    (worker,) = [p for p in children if "ray::Written" in " ".join(p.cmdline())]
    worker.kill()


def told(run: Any) -> Any:
    return sorted([key, value] for key, value in case.answers(run).items())


def losses(head: Any, second: Any) -> dict[str, Any]:
    """A worker is killed, then the node of the other removed, in the middle."""
    local = run_sweep(settings("local"))
    diary = Diary({
        6: lambda: kill_worker_of(head), 18: lambda: CLUSTER.remove_node(second, False),
    })  # fmt: skip
    with workers(Written):
        there = run_sweep(
            settings("ray", executor="ray", latency=True, latency_rounds=1), progress=diary
        )
    asked = Counter((HOME / "asked").read_text().splitlines())
    # the folder is finished for the other executor
    again = run_sweep(settings("ray"))
    return {
        "equal": told(local) == told(there),
        "rows": [len(local.rows), len(there.rows), len(again.rows)],
        "twice": there.duplicates,
        "overlays": [len(local.overlays()), local.overlays() == there.overlays()],
        "finished": there.info["finished"],
        "timed": sorted((there.latency or {"trials": ()})["trials"]),
        "gates": [{k: v.outcome for k, v in run.gates().items()} for run in (local, there)],
        "pieces": len(asked),
        "repeated": sum(asked.values()) - len(asked),
        "said": diary.said,
    }


def interrupted() -> dict[str, Any]:
    """A folder that this process began, Ray went on with until Ctrl-C, and this one finished."""
    few: dict[str, Any] = {"noise": False, "methods": ("fastv",)}
    counts = []
    me = os.getpid()
    soon = threading.Timer(0.1, os.kill, (me, signal.SIGINT))  # while it waits for workers
    for executor, stop in (("local", lambda: os.kill(me, signal.SIGTERM)), ("ray", soon.start)):
        diary = Diary({6 if executor == "local" else 1: stop})
        with suppress(KeyboardInterrupt), workers(Written):
            run_sweep(settings("turns", executor=executor, **few), progress=diary)
            raise AssertionError("not interrupted")
        counts.append(len(read_run(HOME / "turns").rows))
    last = run_sweep(settings("turns", **few))
    whole = read_run(HOME / "local")
    of_both = {name: row for name, row in case.answers(whole).items() if name[0] in last.trials}
    return {
        "counts": [*counts, len(last.rows)],
        "equal": case.answers(last) == of_both,
        "twice": last.duplicates,
        "sigterm": signal.getsignal(signal.SIGTERM) is BEFORE,
        "connected": ray.is_initialized(),
    }


def poisoned() -> str:
    work_module.MOST_LOSSES = 2  # each takes a worker's start
    return refused(Poisoned, limit=3)


def refused(kind: type, **changes: Any) -> str:
    try:
        with workers(kind):
            run_sweep(settings("no", executor="ray", noise=False, fresh=True, **changes))
    except (ValueError, OSError, TrialsFailedError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


def too_many_threads() -> str:
    torch.set_num_threads(3)
    try:
        return refused(Poisoned)
    finally:
        torch.set_num_threads(1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    BEFORE = signal.getsignal(signal.SIGTERM)
    CLUSTER = Cluster()
    try:
        head = CLUSTER.add_node(num_cpus=1, object_store_memory=STORE)
        second = CLUSTER.add_node(num_cpus=1, object_store_memory=STORE)
        BEFORE = signal.getsignal(signal.SIGTERM)
        ADDRESS = CLUSTER.address
        outcomes: dict[str, Any] = {}
        for name, scene in {
            "losses": lambda: losses(head, second),
            "interrupted": interrupted,
            "poisoned": poisoned,
            "elsewhere": lambda: refused(Elsewhere),
            "too many threads": too_many_threads,
            "nobody there": lambda: refused(Worker, address="127.0.0.1:9"),
            "no address": lambda: refused(Worker, address="nowhere"),
        }.items():
            began = time.monotonic()
            outcomes[name] = scene()
            print(name, f"{time.monotonic() - began:.1f} s", flush=True)
        (HOME / "outcomes.json").write_text(json.dumps(outcomes))
    finally:
        ray.shutdown()
        CLUSTER.shutdown()
