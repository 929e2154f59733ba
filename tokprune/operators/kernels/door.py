"""When the kernels are used instead of plain PyTorch."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

#: Longest row that one program holds: its state and the row are in registers (see the table that
#: ``tests/test_kernels.py`` asserts).
LONGEST_ROW = 8192


def available(*tensors: Tensor) -> bool:
    """Kernels may take these tensors.

    They must lie on an NVIDIA GPU of compute capability 8.0 or later and need no gradient, Triton
    must be installed, and the environment variable ``TOKPRUNE_KERNELS`` must not be ``0``. While
    torch.compile traces, plain PyTorch is what it gets.
    """
    if not all(tensor.is_cuda for tensor in tensors):
        return False
    if torch.compiler.is_compiling() or os.environ.get("TOKPRUNE_KERNELS") == "0":
        return False
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    return _installed() and _recent(tensors[0].device.index)


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's GPU the current one, on which Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def options(warps: int) -> dict[str, Any]:
    """How a kernel is compiled. Products and sums may be fused; Triton 3.9 wants to be told."""
    return {"num_warps": warps, "enable_fp_fusion": True}


@cache
def _installed() -> bool:
    return torch.version.cuda is not None and find_spec("triton") is not None


@cache
def _recent(device: int) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)
