"""Position arguments for forwards called by hand: those that ``generate()`` would pass."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from tokprune.families import bind


def positions(inputs: dict[str, Tensor]) -> Tensor:
    """[B, L] position ids as generate() numbers padded prompts."""
    return (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)


def prompt_positions(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What numbers the tokens of a prompt; models with M-RoPE make their positions themselves."""
    return {} if _axes(model) > 1 else {"position_ids": positions(inputs)}


def later_positions(model: Any, mask: Tensor, new: int) -> dict[str, Tensor]:
    """What numbers the last ``new`` tokens of a conversation, of which all before are cached.

    Args:
        model: of which the conversation's prompt was the last to be run.
        mask: [B, tokens] of the whole conversation.
        new: tokens of the next forward.
    """
    if _axes(model) == 1:
        return {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, -new:]}
    inner = model.model
    length = mask.shape[1]
    if "mm_token_type_ids" in inspect.signature(inner.forward).parameters:
        flat = (mask.cumsum(1) - 1)[:, -new:]
    else:  # transformers 4.57 counts padding, too
        flat = torch.arange(length - new, length).expand(len(mask), -1)
    deltas = inner.rope_deltas
    flat = flat if deltas is None else flat + deltas.to(mask.device)
    return {"position_ids": flat.expand(3, -1, -1)}


def _axes(model: Any) -> int:
    return bind(model).facts.axes


__all__ = ["later_positions", "positions", "prompt_positions"]
