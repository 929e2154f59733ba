"""Labels of a prompt that lost tokens: those of the tokens that are left, where these stand now."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from tokprune.engine.compiling import refuse_export, with_step
from tokprune.engine.copies import refuse_replica
from tokprune.engine.traced_step import nothing_to_do

_FUNCTION = "_loss_function"
#: label of a token that is not scored, as in torch's cross entropy
IGNORED = -100


@dataclass(frozen=True)
class Alive:
    """Where the tokens of a prompt [B, L] stand in what the decoder gave [B, L', …]: ``column``
    [B, L'] of the prompt, −1 = padding. ``back`` [B, L]: where nothing was dropped and padding
    alone has moved, the place of every column."""

    column: Tensor
    back: Tensor | None = None

    def labels(self, labels: Tensor) -> Tensor:
        """Labels [B, L] at [B, L']; that of a row's first token goes, as nothing predicts it."""
        column = self.column.to(labels.device)
        real = column >= 0
        out = labels.gather(1, column.clamp(min=0)).masked_fill(~real, IGNORED)
        return out.scatter(1, real.int().argmax(1, keepdim=True), IGNORED)

    def loss(self, function: Callable[..., Tensor], call: dict[str, Any]) -> Tensor:
        """A model's loss function, called with ``logits`` [B, L', V], ``labels`` [B, L] (or
        ``shift_labels``, one place ahead) and what else it takes."""
        if self.back is not None:
            logits = call["logits"]
            index = self.back.to(logits.device)[:, :, None].expand(-1, -1, logits.shape[2])
            return function(**{**call, "logits": logits.gather(1, index)})
        labels, ahead = call.get("labels"), call.get("shift_labels")
        if ahead is not None:
            labels = F.pad(ahead[:, :-1], (1, 0), value=IGNORED)
        own = self.labels(labels) if labels is not None else None
        if ahead is not None and own is not None:
            call = {**call, "shift_labels": F.pad(own[:, 1:], (0, 1), value=IGNORED)}
        return function(**{**call, "labels": own})


class _Without:
    """An object as it is without one of its own attributes."""

    def __init__(self, wrapped: Any, name: str) -> None:
        self._wrapped, self._name = wrapped, name

    def __getattr__(self, name: str) -> Any:
        if name == self._name:
            raise AttributeError(name)
        return getattr(self._wrapped, name)


class LossHooks:
    """Before and after a forward of the whole model with labels: its loss is taken at what is left
    of the prompt, which ``alive()`` tells (None: all, in its place).

    ``model.loss_function`` of transformers is no module that a hook could reach: while such a
    forward runs, an attribute of this one model stands before it. A class with a loss of its own
    gets the usual one, of labels that were taken out of the call: at once, or by who makes
    embeddings of its prompts (``late``).
    """

    def __init__(self, model: Any, alive: Callable[[], Alive | None], late: bool = False) -> None:
        self.model, self.alive, self.late = model, alive, late
        forward = inspect.unwrap(type(model).forward)
        self.arguments = list(inspect.signature(forward).parameters)[1:]
        self.asks = "loss_function" in forward.__code__.co_names
        self.thread = threading.local()
        #: forwards with labels that run, in all threads, and what their attribute stands before
        self._running, self._given, self._lock = 0, None, threading.Lock()

    def install(self) -> list[Any]:
        if "labels" not in self.arguments:
            return []
        idle = nothing_to_do(self.arguments)
        return [
            self.model.register_forward_pre_hook(with_step(self._before, idle), with_kwargs=True),
            self.model.register_forward_hook(
                with_step(self._after, idle), with_kwargs=True, always_call=True
            ),
        ]

    def take(self, labels: Tensor | None) -> Tensor | None:
        """Keep labels [B, L] from the forward that runs, until it ends; gives them back where none
        does."""
        if not getattr(self.thread, "runs", False):
            return labels
        self.thread.labels = labels
        return None

    def _before(self, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        refuse_replica(module)
        refuse_export()
        self.thread.runs, self.thread.labels = True, None
        call = {**dict(zip(self.arguments, args)), **kwargs}
        labels = call.get("labels")
        if labels is None and call.get("shift_labels") is None:
            return None
        if self.asks:
            self._stand()
        elif labels is not None and (not self.late or call.get("inputs_embeds") is not None):
            mask = call.get("attention_mask")
            self.take(labels if mask is None else labels.masked_fill(mask == 0, IGNORED))
            return (), {**call, "labels": None}
        return None

    def _stand(self) -> None:
        """Have the attribute stand before the loss function until this thread's forward ends."""
        with self._lock:
            if not self._running:
                self._given = self.model.__dict__.get(_FUNCTION)
                self.model.__dict__[_FUNCTION] = functools.partial(self._loss, self._given)
            self._running += 1
        self.thread.stands = True

    def _step_back(self) -> None:
        if not self.thread.__dict__.pop("stands", False):
            return
        with self._lock:
            self._running -= 1
            if self._running:
                return
            given, self._given = self._given, None
            if given is None:
                del self.model.__dict__[_FUNCTION]
            else:
                self.model.__dict__[_FUNCTION] = given

    def _loss(self, given: Any, logits: Tensor, labels: Any, *rest: Any, **more: Any) -> Tensor:
        function = given
        if function is None:
            function = type(self.model).loss_function.fget(_Without(self.model, _FUNCTION))
        names = list(inspect.signature(function).parameters)[2:]
        call = {"logits": logits, "labels": labels, **dict(zip(names, rest)), **more}
        alive = self.alive()
        return function(**call) if alive is None else alive.loss(function, call)

    def _after(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        self._step_back()
        labels = self.thread.__dict__.pop("labels", None)
        self.thread.runs = False
        if labels is None or output is None:
            return None
        logits = output[0] if isinstance(output, tuple) else output.logits
        loss = self._loss(_cross_entropy, logits, labels)
        if isinstance(output, tuple):
            return loss, *output
        return type(output)(**{**output, "loss": loss})


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the tokens with a label, each predicted by the one before it."""
    ahead = labels[:, 1:].flatten().to(logits.device)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ahead, ignore_index=IGNORED)
