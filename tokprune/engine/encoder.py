"""Hooks inside the vision encoder: attention taps, drops and merges in and after its blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tokprune.engine.contracts import (
    Attention,
    EncoderOutcome,
    EncoderRun,
    EncoderStage,
    Reduction,
    TowerInput,
    TowerTokens,
)
from tokprune.engine.masks import backend_of, check_backend, encoder_mask
from tokprune.engine.tap import install_tap


def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of [B, T, …] at ``rows`` [B, T'] (−1 = padding, gathers row 0)."""
    index = rows.clamp(min=0).view(*rows.shape, *[1] * (x.dim() - 2))
    return x.gather(1, index.expand(*rows.shape, *x.shape[2:]))


def initial_tokens(tower: TowerInput) -> TowerTokens:
    """Every patch alive, in raster order, after the class token."""
    tiles, n, cls = len(tower.image_of_tile), tower.facts.patches, int(tower.facts.has_cls)
    slots = torch.arange(-cls, n, device=tower.device)
    group = torch.arange(cls, n + cls, device=tower.device)
    return TowerTokens(
        has_cls=bool(cls),
        slots=slots.expand(tiles, n + cls),
        group=group.expand(tiles, n),
        counts=[n + cls] * tiles,
    )


def reduce_tokens(tokens: TowerTokens, reduction: Reduction) -> TowerTokens:
    """Book-keeping of a reduction: which slot each new row stands for, where each patch went."""
    rows = reduction.rows
    padded = reduction.counts is not None
    slots = gather_rows(tokens.slots, rows)
    group = reduction.group
    if group is None:
        group = torch.full_like(tokens.slots, -1)
        new = torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
        if padded:  # padding rows write into a column that is cut off again
            group = torch.cat([group, group[:, :1]], dim=1)
            group = group.scatter(1, torch.where(rows < 0, group.shape[1] - 1, rows), new)[:, :-1]
        else:
            group = group.scatter(1, rows, new)
    moved = group.gather(1, tokens.group.clamp(min=0))
    valid = None
    if padded:
        slots = slots.masked_fill(rows < 0, -1)
        valid = rows >= 0
    counts = reduction.counts or [rows.shape[1]] * rows.shape[0]
    return TowerTokens(
        has_cls=tokens.has_cls,
        slots=slots,
        group=torch.where(tokens.group < 0, -1, moved),
        counts=counts,
        valid=valid,
    )


class TowerPass:
    """One forward of the vision encoder: the runs of all encoder stages, and the tokens alive."""

    def __init__(self, stages: tuple[EncoderStage, ...], tower: TowerInput) -> None:
        self.tower = tower
        self.stages = stages
        self.runs = [stage.start(tower) for stage in stages]
        self.tokens = initial_tokens(tower)
        #: tokens after each layer, for the trace: (layer, tokens)
        self.history: list[tuple[int, TowerTokens]] = []
        self.residual: Tensor | None = None
        self.outcomes: list[EncoderOutcome] = []
        self.reduced = False
        #: output of the feature layer, where a stage reduced it there
        self.features: Tensor | None = None

    def apply(self, layer: int, hidden: Tensor, reduction: Reduction) -> Tensor:
        new = (
            reduction.hidden
            if reduction.hidden is not None
            else gather_rows(hidden, reduction.rows)
        )
        self.tokens = reduce_tokens(self.tokens, reduction)
        self.history.append((layer, self.tokens))
        self.reduced = True
        return new

    def finish(self) -> None:
        self.outcomes = [run.finish(self.tokens) for run in self.runs]


class EncoderHooks:
    """Installs the hooks that the encoder stages of a plan need, and nothing else.

    ``current()`` gives the pass in progress, or None when the tower runs on its own.
    """

    def __init__(
        self,
        layers: list[Any],
        stages: tuple[EncoderStage, ...],
        current: Callable[[], TowerPass | None],
        tap: Callable[..., Any] = install_tap,
        legacy: bool = False,
    ) -> None:
        self.layers, self.stages, self.current, self.tap = layers, stages, current, tap
        #: attention of transformers 4.37, which takes masks of full shape only
        self.legacy = legacy
        self.backend = "eager"
        if stages:
            self.backend = check_backend(backend_of(layers[0].self_attn), "vision tower")

    def install(self) -> list[Any]:
        handles: list[Any] = []
        ragged = any(stage.reduces for stage in self.stages)
        for number, layer in enumerate(self.layers):
            taps = self._stages("taps", number)
            between = self._stages("between_layers", number)
            after = self._stages("after_layers", number)
            bias = self._stages("bias_layers", number)
            if ragged:
                handles.append(
                    layer.self_attn.register_forward_pre_hook(
                        self._mask_hook(number, bias), with_kwargs=True
                    )
                )
            if taps:
                handles.append(
                    self.tap(
                        layer.self_attn,
                        self._tap(number, taps),
                        lambda: self.current() is not None,
                    )
                )
            if between:
                handles.append(
                    layer.layer_norm2.register_forward_pre_hook(self._between(number, between))
                )
                handles.append(layer.mlp.register_forward_hook(self._mlp_hook()))
            if between or after:
                # first of the hooks, so that recorded hidden states are the reduced ones
                handles.append(
                    layer.register_forward_hook(self._after(number, after), prepend=True)
                )
        return handles

    def _stages(self, kind: str, layer: int) -> list[int]:
        return [i for i, stage in enumerate(self.stages) if layer in getattr(stage, kind)]

    def _runs(self, current: TowerPass, which: list[int]) -> list[EncoderRun]:
        return [current.runs[i] for i in which]

    def _tap(self, number: int, which: list[int]) -> Any:
        def tap(
            module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float
        ) -> None:
            current = self.current()
            if current is None:
                return
            attention = Attention(q, k, v, scale, causal=False, valid=current.tokens.valid)
            for run in self._runs(current, which):
                run.attention(number, attention, current.tokens)

        return tap

    def _mask_hook(self, number: int, which: list[int]) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            current = self.current()
            if current is None:
                return None
            bias = None
            for run in self._runs(current, which):
                own = run.bias(number, current.tokens)
                bias = own if bias is None or own is None else bias + own
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            mask = encoder_mask(self.backend, current.tokens.valid, bias, hidden.dtype)
            if mask is None:
                return None
            if self.legacy:
                mask = mask.expand(-1, 1, hidden.shape[1], -1)
            kwargs["attention_mask"] = mask
            return args, kwargs

        return hook

    def _between(self, number: int, which: list[int]) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> Any:
            current = self.current()
            if current is None:
                return None
            hidden = args[0]
            current.residual = None
            for run in self._runs(current, which):
                reduction = run.between(number, hidden, current.tokens)
                if reduction is not None:
                    hidden = current.apply(number, hidden, reduction)
                    current.residual = hidden
            return None if current.residual is None else (hidden,)

        return hook

    def _mlp_hook(self) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Any:
            current = self.current()
            if current is None or current.residual is None:
                return None
            # The block adds its own, longer residual next. Keep the true sum, and give the block
            # a single row that broadcasts; the block hook then replaces what it makes of it.
            current.residual = current.residual + output
            return output[:, :1]

        return hook

    def _after(self, number: int, which: list[int]) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            current = self.current()
            if current is None:
                return None
            hidden = output[0] if isinstance(output, tuple) else output
            changed = False
            if current.residual is not None:
                hidden, current.residual, changed = current.residual, None, True
            for run in self._runs(current, which):
                reduction = run.after(number, hidden, current.tokens)
                if reduction is not None:
                    hidden = current.apply(number, hidden, reduction)
                    changed = True
            if not changed:
                return None
            if number == current.tower.facts.feature_layer:
                current.features = hidden
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return hook
