"""vLLM's runner for the CPU never asks a model whether it prunes, and so leaves in the features the
columns that say where their rows stand."""

from __future__ import annotations

from typing import Any


def wrap_runner() -> None:
    """Let it ask when a model of ours is loaded, as the runner for GPUs does."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    theirs = CPUModelRunner.load_model
    if getattr(theirs, "tokprune", False):
        return

    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        theirs(self, *args, **kwargs)
        if getattr(self.get_model(), "tokprune_positions", False):
            self.is_multimodal_pruning_enabled = True

    load_model.tokprune = True  # type: ignore[attr-defined]
    CPUModelRunner.load_model = load_model
