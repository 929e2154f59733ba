"""Register tokens of a vision encoder, and patches measured by the attention that one gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokprune.operators.checks import check_mask, check_segment
from tokprune.operators.topk import rank, segment_topk

__all__ = ["AgainstRegister", "outlier_activation", "shift", "stage1", "stage1_mutual", "stage2"]


def shift(activations: Tensor, neurons: Sequence[int] | Tensor, class_token: bool = True) -> Tensor:
    """Move what some neurons of an MLP do at the patches to the register, the last row.

    Of every channel named the register gets the largest value among the patches (whatever its own
    was), and the patches get 0. A class token has no part in it.

    Args:
        activations: [B, T, K] of any float dtype, behind the activation function: class token,
            patches, register.
        neurons: channels below K, each once.
        class_token: whether there is one, in front.

    Returns:
        New activations [B, T, K], in their dtype.

    Raises:
        ValueError: another shape, no patch, or (of a sequence) channels that are not there.

    Source: OccamToken, arXiv 2605.29657, eq. 9, after Jiang et al., arXiv 2506.08010, whose code
    takes one maximum over all channels of a layer, class token included.
    """
    first = int(class_token)
    if activations.dim() != 3 or activations.shape[1] < first + 2:
        raise ValueError(
            f"activations have shape {tuple(activations.shape)}; they should be [B, T, K] with "
            f"T ≥ {first + 2}: {'a class token, ' if first else ''}patches, a register"
        )
    if not isinstance(neurons, Tensor):
        width = activations.shape[2]
        if not all(0 <= channel < width for channel in neurons):
            raise ValueError(
                f"neurons={list(neurons)} should be channels from 0 to {width - 1}, those of this "
                "MLP"
            )
        neurons = torch.tensor(list(neurons), dtype=torch.long)
    index = neurons.to(activations.device, non_blocking=True)
    own = activations[:, first:].index_select(2, index)
    moved = torch.zeros_like(own)
    moved[:, -1] = own[:, :-1].amax(1)
    out = activations.clone()
    out[:, first:] = out[:, first:].index_copy(2, index, moved)
    return out


def outlier_activation(activations: Tensor, outlier: Tensor) -> Tensor:
    """How strongly each neuron answers at the outliers of every image.

    Args:
        activations: [B, N, K] of any float dtype, behind the activation function.
        outlier: [B, N] bool, patches of an outlying norm.

    Returns:
        [B, K] float32: mean magnitude over the outliers; 0 for an image without any.

    Raises:
        ValueError: shapes do not match.

    Source: Jiang et al., arXiv 2506.08010, the search for register neurons.
    """
    check_mask("outlier", outlier, activations.shape[:2])
    weight = outlier.float() / outlier.sum(1, keepdim=True).clamp(min=1)
    return torch.einsum("bn,bnk->bk", weight, activations.float().abs())


@dataclass(frozen=True)
class AgainstRegister:
    """``scores`` of tokens, float32, that of their ``register``, and which tokens stay (bool)."""

    scores: Tensor
    register: Tensor
    keep: Tensor


def stage1(attention: Tensor, lam: float, least: int = 0) -> AgainstRegister:
    """Patches to which the class token attends as much as to the register, times ``lam``.

    Args:
        attention: [B, H, N + 2] probabilities of the class token's row: class token, patches,
            register.
        lam: λ₁ ≥ 0; equal scores stay.
        least: so many patches stay in any case, those of the highest score.

    Returns:
        Scores [B, N], register [B], keep [B, N].

    Raises:
        ValueError: another shape, or ``least`` is not from 0 to N.

    Source: OccamToken, arXiv 2605.29657, eq. 10 to 12.
    """
    if attention.dim() != 3 or attention.shape[2] < 3:
        raise ValueError(
            f"attention has shape {tuple(attention.shape)}; it should be [B, H, N + 2]: class "
            "token, patches, register"
        )
    return against_register(attention.float().mean(1)[:, 1:], lam, least)


def stage1_mutual(attention: Tensor, lam: float, least: int = 0) -> AgainstRegister:
    """The same without a class token: by what all rows give on the mean.

    Args:
        attention: [B, H, N + 1, N + 1] probabilities: patches, register.
        lam, least: as for :func:`stage1`.

    Returns:
        Scores [B, N], register [B], keep [B, N].

    Raises:
        ValueError: another shape, or ``least`` is not from 0 to N.

    Source: OccamToken, arXiv 2605.29657, stage 1 without a class token.
    """
    if attention.dim() != 4 or attention.shape[2] != attention.shape[3] or len(attention[0, 0]) < 2:
        raise ValueError(
            f"attention has shape {tuple(attention.shape)}; it should be [B, H, N + 1, N + 1]: "
            "patches, register"
        )
    return against_register(attention.float().mean((1, 2)), lam, least)


def against_register(received: Tensor, lam: float, least: int = 0) -> AgainstRegister:
    """The rule of stage 1 on the attention ``received`` [B, N + 1] by patches and register. What is
    no number stays: who looks for that finds it."""
    scores, register = received[:, :-1], received[:, -1]
    if not 0 <= least <= scores.shape[1]:
        raise ValueError(
            f"least is {least}; it should be from 0 to the number of patches, {scores.shape[1]}"
        )
    keep = ~(scores < float(lam) * register[:, None])
    if least:
        keep = keep.scatter(1, rank(scores)[:, :least], True)
    return AgainstRegister(scores, register, keep)


def stage2(
    highest: Tensor, mean: Tensor, segment: Tensor, register: Tensor, lam: float, least: int = 0
) -> AgainstRegister:
    """Visual tokens to which some token of the question attends as much as all of them on the mean
    to the register, times ``lam``.

    Every image is measured by its own registers; of several (one a tile) by their mean. An image
    without one keeps all it has.

    Args:
        highest, mean: [B, L] float, head mean of the attention that a token gets, the largest and
            the mean over the rows of the question.
        segment: [B, L] long, number of the image that a token belongs to; −1 where it is none.
        register: [B, L] bool, the registers among the visual tokens.
        lam: λ₂ ≥ 0; equal scores stay.
        least: so many tokens beside the registers stay of every image, those of the highest score.

    Returns:
        Scores [B, L], ``highest`` in float32; register [B, L], what each token is measured by (−inf
        without a register); keep [B, L], True at registers and False where ``segment`` is −1.

    Raises:
        ValueError: shapes do not match, or ``least`` is negative.

    Source: OccamToken, arXiv 2605.29657, eq. 13 to 17; several images and registers are ours.
    """
    check_segment(segment, "highest", highest)
    check_segment(segment, "mean", mean)
    check_mask("register", register, segment.shape)
    if least < 0:
        raise ValueError(f"least is {least}; it should be 0 or more")
    scores, visual = highest.float(), segment >= 0
    register = register & visual
    # images are told apart by the tokens themselves: how many there are nobody has to read
    place = torch.where(register, segment, -1) + 1
    bins = torch.zeros(*segment.shape[:1], segment.shape[1] + 1, device=scores.device)
    number = bins.scatter_add(1, place, register.float())
    total = bins.scatter_add(1, place, torch.where(register, mean.float(), 0.0))
    level = torch.where(number > 0, total / number.clamp(min=1), -torch.inf)
    level = level.gather(1, segment + 1)
    keep = visual & (register | ~(scores < torch.where(level.isinf(), level, float(lam) * level)))
    if least:
        others = torch.where(register, -1, segment)
        budget = torch.full_like(segment, least)
        keep = keep | segment_topk(scores, others, budget)
    return AgainstRegister(scores, level, keep)
