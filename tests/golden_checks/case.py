"""One golden case: the tensors and the metadata of a safetensors file."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open


class Missing(KeyError):
    """A case lacks a tensor without which there is nothing to compute its outputs from."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass
class Case:
    """Inputs and outputs of one run of an official function.

    Files hold what their makers found worth it: whole maps or a few rows of them, all outputs or
    some. So checks compare with :meth:`equal`, :meth:`close` and :meth:`told`, which do nothing
    where the file holds no such output; the caller of the check makes sure that ``compared`` is
    not empty in the end.

    ``t``: every tensor of the file by name; ``parameters``: the JSON parameters;
    ``notes``: what to know about half precision and conventions; ``read``: tensors that a check
    asked for; ``compared``: outputs that it compared.
    """

    path: Path
    operator: str
    parameters: Any
    notes: str
    t: dict[str, torch.Tensor]
    read: set[str] = field(default_factory=set)
    compared: set[str] = field(default_factory=set)

    def __getitem__(self, name: str) -> torch.Tensor:
        """An input; for outputs see :meth:`equal`, :meth:`close` and :meth:`output`."""
        if name not in self.t:
            raise Missing(f"{self.path}: no tensor {name!r} among {sorted(self.t)}")
        self.read.add(name)
        return self.t[name]

    def __contains__(self, name: str) -> bool:
        return name in self.t

    def first(self, *names: str) -> torch.Tensor:
        """The input by the first of its names that is there."""
        return self[next((name for name in names if name in self), names[0])]

    def get(self, name: str) -> torch.Tensor | None:
        """An input that not every case has."""
        if name not in self:
            return None
        return self[name]

    def aside(self, *names: str) -> None:
        """Tensors in the file, or not, that say nothing about what is checked."""
        self.read.update(names)

    def output(self, name: str) -> torch.Tensor | None:
        """A recorded output for a comparison of one's own, None where there is none."""
        if name not in self:
            return None
        self.compared.add(name)
        return self.t[name]

    def equal(self, got: torch.Tensor, name: str, where: str = "") -> None:
        """Exactly as recorded under ``name``, if it is; ``where``: more words for the message."""
        want = self.output(name)
        if want is not None:
            assert_equal(got, want, f"{name} {where}".strip())

    def close(
        self,
        got: torch.Tensor,
        name: str,
        rtol: float = 1e-5,
        atol: float = 1e-7,
        where: str = "",
    ) -> None:
        """As recorded under ``name`` up to rounding (see :func:`assert_close`), if it is."""
        want = self.output(name)
        if want is not None:
            assert_close(got, want, f"{name} {where}".strip(), rtol, atol)

    def told(self, got: Any, name: str, where: str = "") -> None:
        """What the parameters tell of the outcome under ``name``, if they do."""
        if name in self.parameters:
            self.compared.add(name)
            want = self.parameters[name]
            assert got == want, f"{name} {where}: {got} != {want}"

    def numbered(self, prefix: str) -> list[int]:
        """The numbers n of the outputs ``<prefix>n``."""
        ends = [name.removeprefix(prefix) for name in self.t if name.startswith(prefix)]
        return sorted(int(end) for end in ends if end.isdecimal())

    def overlooked(self) -> list[str]:
        """Tensors that a check neither read nor compared."""
        return sorted(self.t.keys() - self.read - self.compared)

    def weights(self, prefix: str = "w.") -> dict[str, torch.Tensor]:
        """Model weights: the tensors under ``prefix``, by parameter name, in float32."""
        found = {k: v for k, v in self.t.items() if k.startswith(prefix)}
        self.read.update(found)
        return {
            k[len(prefix) :]: (v.float() if v.is_floating_point() else v) for k, v in found.items()
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
