"""The builtin harness with its answers made on the machines of a Ray cluster."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import tokprune
from tokprune.eval.sweep.batches import gallery_of
from tokprune.eval.sweep.builtin import BuiltinHarness
from tokprune.eval.sweep.evaluator import Batch
from tokprune.eval.sweep.harness import Job, Step
from tokprune.eval.sweep.identity import checkpoint_hash, code_hash, runtime
from tokprune.eval.sweep.loaded_model import LoadedModel
from tokprune.eval.sweep.on_ray.cluster import Cluster, check_address, check_ray, needed, places
from tokprune.eval.sweep.on_ray.crew import Crew, Orders
from tokprune.eval.sweep.on_ray.work import Work
from tokprune.eval.sweep.settings import Settings


@dataclass
class RayHarness(BuiltinHarness):
    """Budgets are matched and times taken in this process, answers made by workers; see
    :class:`tokprune.eval.sweep.harness.Harness`."""

    #: the memory is a worker's where the cluster is on this machine
    own_processes: bool = True
    _model: dict[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def open(cls, settings: Settings) -> RayHarness:
        """Load the benchmark.

        Raises:
            ImportError: Ray is not installed.
            ConnectionError: no cluster answers.
            ValueError, OSError: as for the builtin harness.
        """
        check_ray()
        harness = super().open(settings)
        check_address(settings.address)
        return harness  # type: ignore[return-value]

    def check_compatible(self, loaded: LoadedModel, settings: Settings) -> None:
        super().check_compatible(loaded, settings)
        self._model = {"model": checkpoint_hash(loaded.folder()), "dtype": loaded.dtype}

    def answer(self, job: Job) -> Generator[Step, None, None]:
        work = Work(job.trials, self.items, job.settings.batch_size)
        if work.done:
            return
        with Cluster(job.settings.address) as cluster:
            orders = self._orders(job)
            need, nodes = needed(orders.device, orders.threads), cluster.nodes()
            size = min(places(nodes, need), work.pieces, job.settings.workers or work.pieces)
            if not size:
                raise ValueError(
                    f"no node of the Ray cluster has room for a worker ({_told(need)}; nodes have "
                    f"{', or '.join(_told(node) for node in nodes)}); with OMP_NUM_THREADS set, a "
                    "worker takes as many cores"
                )
            note = f"{size} workers on Ray, {_told(need)} each"
            if orders.device == "cpu" and any(node.get("GPU") for node in nodes):
                note += "; GPUs are left alone, since this process has none (or device=cpu)"
            yield Step(note=note)
            yield Step(stage=("answers", sum(len(task.rows) for task in job.trials)))
            yield from Crew(cluster, work, orders, size).run()

    def time_trials(self, job: Job, progress: Callable[[int, int], None]) -> dict[str, Any]:
        if job.loaded.model is None:
            job.loaded = LoadedModel.load(
                job.settings.model, job.settings.dtype, job.settings.device,
                job.settings.trust_remote_code,
            )  # fmt: skip
            job.sample = [Batch(job.loaded, self.benchmark, job.sample[0].items)]
        return super().time_trials(job, progress)

    def _orders(self, job: Job) -> Orders:
        device = job.loaded.device.type
        main = [task.trial for task in job.trials if not task.trial.entry["noise"]]
        return Orders(
            _anywhere(job.settings),
            gallery_of(main, job.loaded, self.benchmark, self.items),
            device,
            torch.get_num_threads() if device == "cpu" else None,
            {
                "tokprune": tokprune.__version__,
                "code": code_hash(runtime(device)),
                "benchmark": self.benchmark.version_of(self.items),
                **self._model,
            },
        )


def _anywhere(settings: Settings) -> Settings:
    """The settings with whole paths: workers start in other folders."""
    changes: dict[str, Any] = {}
    for name in ("model", "benchmark", "images", "answers"):
        value = getattr(settings, name)
        if value is not None and (path := Path(value).expanduser()).exists():
            changes[name] = str(path.absolute())
    return dataclasses.replace(settings, **changes)


def _told(resources: dict[str, Any]) -> str:
    """ "1 GPU", "8 cores"."""
    if gpus := resources.get("GPU"):
        return f"{gpus:g} GPU{'s' * (gpus != 1)}"
    cores = resources.get("CPU", 0)
    return f"{cores:g} core{'s' * (cores != 1)}"
