"""One model in a process of a Ray cluster, which answers batches as a single process does."""

from __future__ import annotations

from typing import Any

import torch

import tokprune
from tokprune.eval.sweep.batches import NoRoomError, answer_batch, second_copy
from tokprune.eval.sweep.builtin import BuiltinHarness, sharing
from tokprune.eval.sweep.evaluator import Batch, Evaluator
from tokprune.eval.sweep.harness import OpenTrial, Step
from tokprune.eval.sweep.identity import checkpoint_hash, code_hash, runtime
from tokprune.eval.sweep.loaded_model import LoadedModel
from tokprune.eval.sweep.places import placed_items
from tokprune.eval.sweep.settings import Settings


class Worker:
    """The class of the actors. It is asked who it is, then to load the model, then for answers.

    Args:
        device: "cpu" or "cuda", the one that Ray has given it.
        threads: of torch on a CPU; another number would change the last bits of an answer.
    """

    def __init__(self, device: str, threads: int | None) -> None:
        self.device = device
        if threads is not None:
            torch.set_num_threads(threads)

    def who(self) -> dict[str, str]:
        """Where this is, and which code would answer."""
        import ray

        return {
            "address": ray.util.get_node_ip_address(),
            "tokprune": tokprune.__version__,
            "code": code_hash(runtime(self.device)),
        }

    def load(self, settings: Settings, gallery: tuple[set[str], set[str]]) -> dict[str, str]:
        """Load benchmark and model; says which they are.

        Raises:
            ValueError, OSError: they are not to be had here.
        """
        harness = BuiltinHarness.open(settings)
        self.settings, self.items, self.gallery = settings, harness.items, gallery
        self.benchmark = harness.benchmark
        self.loaded = LoadedModel.load(
            settings.model, settings.dtype, self.device, settings.trust_remote_code
        )
        #: of a repetition at another dtype
        self.copy: LoadedModel | None = None
        #: what was answered last: a batch is kept for the next trial on it
        self.batch: Batch | None = None
        self.key: tuple[Any, ...] = ()
        #: open as long as the process lives
        self.shared = sharing(self.loaded, settings).__enter__()
        return {
            "benchmark": self.benchmark.version_of(self.items),
            "model": checkpoint_hash(self.loaded.folder()),
            "dtype": self.loaded.dtype,
        }

    def answer(self, task: OpenTrial, start: int, stop: int) -> Step | NoRoomError:
        """One trial on the items from ``start`` to before ``stop``. The next trial on them finds
        their images read, and their encoder outputs where these are shared."""
        entry = task.trial.entry
        try:
            loaded = self._model(entry["dtype"])
        except NoRoomError as error:
            return error
        key = (entry["noise"], entry["dtype"], start, stop)
        if self.batch is None or key != self.key:
            self.batch, self.key = Batch(loaded, self.benchmark, self.items[start:stop]), key
            if self.shared is not None:
                # as in a single process, repetitions for the noise floor share nothing
                self.shared.remember(None if entry["noise"] else self.batch.pixels)
        evaluator = Evaluator(loaded, self.benchmark, self.gallery, placed_items(self.items))
        return answer_batch(evaluator, task, self.batch)

    def _model(self, dtype: str) -> LoadedModel:
        """The model in a dtype. A copy goes when the first is asked for again."""
        if dtype == self.loaded.dtype:
            self.copy = None
            return self.loaded
        if self.copy is None:
            self.batch = None
            self.copy = second_copy(self.loaded, self.settings, dtype)
        return self.copy
