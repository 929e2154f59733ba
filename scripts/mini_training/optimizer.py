"""bfloat16 weights with float32 masters: matrices by Muon, everything else by AdamW."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Optimizer:
    """Steps float32 copies of the parameters and writes them back in the model's dtype."""

    def __init__(
        self, named: Iterable[tuple[str, nn.Parameter]], lr: float, decay: float = 0.02,
    ) -> None:  # fmt: skip
        self.named = [(n, p) for n, p in named if p.requires_grad]
        self.master = [p.detach().float().clone().requires_grad_() for _, p in self.named]
        matrices, rest = [], []
        for (name, p), m in zip(self.named, self.master):
            hidden = p.dim() == 2 and "embed" not in name and "head" not in name
            (matrices if hidden else rest).append(m)
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            self.parts.append(
                torch.optim.Muon(
                    matrices, lr=lr, weight_decay=decay, momentum=0.95, nesterov=True,
                    adjust_lr_fn="match_rms_adamw",
                )
            )  # fmt: skip
        self.parts.append(
            torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
        )
        self.lr = lr

    def step(self, scale: float) -> float:
        """One step at ``scale`` times the learning rate; gradients are clipped to norm 1."""
        grads = []
        for (_, p), m in zip(self.named, self.master):
            m.grad = torch.zeros_like(m) if p.grad is None else p.grad.float()
            grads.append(m.grad)
            p.grad = None
        norm = float(torch.nn.utils.get_total_norm(grads))
        if math.isfinite(norm):
            if norm > 1:
                torch._foreach_mul_(grads, 1 / norm)
            for part in self.parts:
                for group in part.param_groups:
                    group["lr"] = self.lr * scale
                part.step()
            with torch.no_grad():
                for (_, p), m in zip(self.named, self.master):
                    p.copy_(m)
        return norm

    def state(self) -> dict[str, Tensor]:
        """Masters and moments as flat named tensors."""
        out = {f"master.{n}": m.detach() for (n, _), m in zip(self.named, self.master)}
        names = {id(m): n for (n, _), m in zip(self.named, self.master)}
        for part in self.parts:
            for m, values in part.state.items():
                for key, value in values.items():
                    out[f"{key}.{names[id(m)]}"] = torch.as_tensor(value)
        return out

    def load(self, state: dict[str, Tensor]) -> None:
        """Inverse of :meth:`state`; what is missing stays as it is."""
        for (name, p), m in zip(self.named, self.master):
            if f"master.{name}" in state:
                with torch.no_grad():
                    m.copy_(state[f"master.{name}"])
                    p.copy_(m)
        names = {id(m): n for (n, _), m in zip(self.named, self.master)}
        for part in self.parts:
            keys = ("momentum_buffer",) if isinstance(part, torch.optim.Muon) else (
                "step", "exp_avg", "exp_avg_sq")  # fmt: skip
            for group in part.param_groups:
                for m in group["params"]:
                    found = {k: state[f"{k}.{names[id(m)]}"].clone() for k in keys
                             if f"{k}.{names[id(m)]}" in state}  # fmt: skip
                    if len(found) == len(keys):
                        part.state[m] = found
