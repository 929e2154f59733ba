"""How likely given tokens are: log-likelihoods and perplexity of answers, compressed or not."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokprune.api import session_of
from tokprune.engine.labels import IGNORED, Alive
from tokprune.families import unwrap


@dataclass(frozen=True)
class Likelihood:
    """Of every token of a batch of prompts [B, L] that was scored.

    Attributes:
        log_probs: [B, L] float32, natural logarithm of its probability after all that stands before
            it; 0 where nothing was scored.
        scored: [B, L] bool.
        greedy: [B, L] bool, whether no token was more likely; False where nothing was scored.
    """

    log_probs: Tensor
    scored: Tensor
    greedy: Tensor

    @property
    def total(self) -> Tensor:
        """[B] log-likelihood of what was scored of every row."""
        return self.log_probs.sum(1)

    @property
    def mean(self) -> Tensor:
        """[B] the same per token, which does not prefer short answers; NaN where nothing was."""
        return self.total / self.scored.sum(1)

    @property
    def perplexity(self) -> Tensor:
        """[B] exp(−mean)."""
        return (-self.mean).exp()

    @property
    def all_greedy(self) -> Tensor:
        """[B] bool: greedy decoding would have given exactly this."""
        return (self.greedy | ~self.scored).all(1)


def log_likelihood(model: Any, inputs: Mapping[str, Tensor], labels: Tensor) -> Likelihood:
    """Log-likelihoods of the tokens of prompts, in one forward.

    With a patched model they are those of the compressed prompt. Gradients flow as the caller has
    it (``torch.no_grad()`` to score).

    Args:
        model: a supported model, patched or not, wrapped or not.
        inputs: of its forward, answers included, as the processor makes them.
        labels: [B, L] long as for a loss: the ids of the tokens to score, −100 elsewhere. A label
            on a visual token that was dropped, or on the first token of a row, is not scored.

    Raises:
        ValueError: labels of another shape than ``input_ids``, or without any token to score.
        UnsupportedModelError: no such model.

    Example::

        labels = inputs["input_ids"].clone()
        labels[:, :prompt_length] = -100
        with tokprune.compress(model, "divprune", keep=64), torch.no_grad():
            print(tokprune.log_likelihood(model, inputs, labels).perplexity)
    """
    ids = inputs.get("input_ids")
    if ids is None or labels.shape != ids.shape:
        shape = "missing" if ids is None else list(ids.shape)
        raise ValueError(
            f"labels has shape {list(labels.shape)}; it should be that of input_ids ({shape})"
        )
    wanted = labels != IGNORED
    if not bool(wanted.any()):
        raise ValueError("labels is -100 everywhere; it should hold the ids of tokens to score")
    # what stands before the first of them gives no logits that are needed
    ends = ids.shape[1] - int(wanted.any(0).nonzero()[0]) + 1
    options: dict[str, Any] = {}
    if "logits_to_keep" in inspect.signature(type(unwrap(model)).forward).parameters:
        options["logits_to_keep"] = min(ends, ids.shape[1])
    call = {name: value for name, value in inputs.items() if name != "labels"}
    logits = model(**call, **options, use_cache=False, return_dict=True).logits
    session = session_of(model)
    alive = None if session is None else session.alive
    if alive is None:
        column = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        mask = inputs.get("attention_mask")
        alive = Alive(column if mask is None else column.masked_fill(mask == 0, -1))
    return _scored(logits, alive, labels)


def _scored(logits: Tensor, alive: Alive, labels: Tensor) -> Likelihood:
    """From the last logits [B, k, V] of a forward."""
    k = logits.shape[1]
    own = alive.labels(labels)[:, -k:].to(logits.device)
    column = alive.column[:, -k:].to(logits.device)
    row, place = (own[:, 1:] != IGNORED).nonzero(as_tuple=True)
    token, at = own[row, place + 1], column[row, place + 1]
    picked = logits[row, place].float().log_softmax(-1)
    empty = torch.zeros(labels.shape, device=logits.device)
    chosen = picked.gather(1, token[:, None])[:, 0]
    best = picked.detach().amax(1) <= chosen.detach()
    return Likelihood(
        empty.index_put((row, at), chosen),
        empty.bool().index_put((row, at), torch.ones_like(best)),
        empty.bool().index_put((row, at), best),
    )
