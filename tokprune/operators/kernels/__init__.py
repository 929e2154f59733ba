"""Triton kernels of some operators; plain PyTorch stands beside each, in the operator's module.

Operators ask :func:`available` and import the launcher they need only then, so nothing here imports
Triton on a machine that cannot use it. Launchers take checked arguments and never wait for the
device, so they can be captured in a CUDA graph once a first call has compiled them.
"""

from tokprune.operators.kernels.door import LONGEST_ROW, available

__all__ = ["LONGEST_ROW", "available"]
