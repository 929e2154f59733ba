"""How a decoder layer changes the fine detail of an image's tokens on their grid (CLSE)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["evolution", "spectral"]

_EPS = 1e-6
#: complex numbers that are held at a time
_AT_ONCE = 1 << 24


@torch.no_grad()
def spectral(x: Tensor, grid: tuple[int, int], cutoff: float = 0.1) -> Tensor:
    """How much of each token is high spatial frequencies: modulus after a high-pass filter, mean
    over channels.

    Always in float32, several channels at a time where all would need much room.

    Args:
        x: [..., t·h·w, C] token features of any float dtype, t grids one after the other, row by
            row; each is filtered by itself.
        grid: (h, w).
        cutoff: width of the Gaussian that is taken away around frequency 0, as a share of the
            lowest of the largest frequencies of both axes; 0 takes nothing away.

    Returns:
        [..., t·h·w] float32.

    Raises:
        ValueError: the tokens are no whole number of grids, or ``cutoff`` is negative.

    Source: CLSE, arXiv 2606.24165, official code.
    """
    height, width = grid
    if x.dim() < 2 or min(grid) < 1 or x.shape[-2] % (height * width):
        raise ValueError(
            f"x has shape {tuple(x.shape)}; with grid={grid} it should be [..., n, C], and n a "
            f"multiple of {height * width}"
        )
    if not cutoff >= 0:
        raise ValueError(f"cutoff is {cutoff}; it should be at least 0")
    passed = _high_pass(height, width, cutoff, x.device)
    total = x.new_zeros(x.shape[:-1], dtype=torch.float32)
    channels = x.shape[-1]
    block = max(1, _AT_ONCE // max(1, total.numel()))
    for part in x.split(block, -1) if channels else ():
        maps = part.float().movedim(-1, -2).unflatten(-1, (-1, height, width))
        detail = torch.fft.ifft2(torch.fft.fft2(maps) * passed).abs()
        total += detail.flatten(-3).sum(-2)
    return total / max(1, channels)


def _high_pass(height: int, width: int, cutoff: float, device: torch.device) -> Tensor:
    """[h, w], in the order of the transform: 0 at frequency 0, 1 far from it."""
    y = torch.fft.fftfreq(height, 1 / height, device=device)
    x = torch.fft.fftfreq(width, 1 / width, device=device)
    spread = min(height // 2, width // 2) * cutoff
    if not spread:  # nothing is taken away
        return torch.ones(height, width, device=device)
    return -torch.expm1((y[:, None].square() + x.square()) / (-2 * spread**2))


@torch.no_grad()
def evolution(before: Tensor, after: Tensor, temperature: float = 0.1) -> Tensor:
    """Factor in [0, 1] of how much the detail of each token changes, against that of the others.

    Args:
        before: [..., n] from :func:`spectral` of what enters a layer.
        after: [..., n] the same of what comes out of it.
        temperature: of the sigmoid; the lower, the sharper.

    Returns:
        [..., n] float32; ½ where all change alike.

    Raises:
        ValueError: shapes differ, or ``temperature`` is not above 0.

    Source: CLSE, arXiv 2606.24165, official code.
    """
    if before.dim() < 1 or before.shape != after.shape:
        raise ValueError(
            f"before has shape {tuple(before.shape)} and after {tuple(after.shape)}; both should "
            "be [..., n]"
        )
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it should be above 0")
    a, b = before.float(), after.float()
    change = ((b - a).abs() / (a.mean(-1, keepdim=True) + a + _EPS)).clamp(max=1)
    apart = change - change.mean(-1, keepdim=True)
    # the deviation of a single token would be 0 / 0
    spread = (apart.square().sum(-1, keepdim=True) / max(1, change.shape[-1] - 1)).sqrt()
    return torch.sigmoid(apart / (spread + _EPS) / temperature)
