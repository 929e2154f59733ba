"""One golden case: the tensors and the metadata of a safetensors file."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open


@dataclass
class Case:
    """Inputs and outputs of one run of an official function.

    ``t``: every tensor of the file by name; ``parameters``: the JSON parameters;
    ``notes``: what to know about half precision and conventions.
    """

    path: Path
    operator: str
    parameters: Any
    notes: str
    t: dict[str, torch.Tensor]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.t[name]

    def __contains__(self, name: str) -> bool:
        return name in self.t

    def weights(self, prefix: str = "w.") -> dict[str, torch.Tensor]:
        """Model weights: the tensors under ``prefix``, by parameter name, in float32."""
        return {
            k[len(prefix) :]: (v.float() if v.is_floating_point() else v)
            for k, v in self.t.items()
            if k.startswith(prefix)
        }


def load_case(path: Path) -> Case:
    with safe_open(path, framework="pt") as f:
        meta = f.metadata() or {}
        tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 (not a dict)
    parameters = json.loads(meta.get("parameters") or meta.get("params") or "{}")
    return Case(path, meta.get("operator", ""), parameters, meta.get("notes", ""), tensors)


def assert_equal(got: torch.Tensor, want: torch.Tensor, what: str) -> None:
    """Indices and counts: exactly equal, shapes included."""
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)} != {tuple(want.shape)}"
    assert torch.equal(got.to(want.dtype), want), f"{what}: {got.tolist()} != {want.tolist()}"


def assert_close(
    got: torch.Tensor, want: torch.Tensor, what: str, rtol: float = 1e-5, atol: float = 1e-7
) -> None:
    """Floats: 1e-5 relative to the largest entry (rtol·max|want| + atol), shapes included."""
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)} != {tuple(want.shape)}"
    if want.numel() == 0:
        return
    got64, want64 = got.double(), want.double()
    assert torch.isfinite(got64).all(), f"{what}: not finite"
    error = (got64 - want64).abs().max().item()
    limit = rtol * want64.abs().max().item() + atol
    assert error <= limit, f"{what}: error {error:.3g} > {limit:.3g}"
