"""Hooks inside the vision encoder: attention taps, drops and merges in and after its blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tokprune.engine.check import UNNAMED, Contracts
from tokprune.engine.compiling import traceable
from tokprune.engine.contracts import (
    ADDED,
    Attention,
    EncoderOutcome,
    EncoderRun,
    EncoderStage,
    Rectify,
    Reduction,
    TowerInput,
    TowerTokens,
)
from tokprune.engine.masks import check_backend, encoder_mask
from tokprune.engine.stands_for import in_tower
from tokprune.engine.tap import Call, install_tap, tapped_backend
from tokprune.errors import UnsupportedModelError


def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of [B, T, …] at ``rows`` [B, T'] (−1 = padding, gathers row 0)."""
    index = rows.clamp(min=0).view(*rows.shape, *[1] * (x.dim() - 2))
    return x.gather(1, index.expand(*rows.shape, *x.shape[2:]))


def initial_tokens(tower: TowerInput, extra: int = 0) -> TowerTokens:
    """Every patch alive, in raster order, after the class token; ``extra`` added rows behind."""
    tiles, n, cls = len(tower.image_of_tile), tower.facts.patches, int(tower.facts.has_cls)
    slots = torch.arange(-cls, n, device=tower.device)
    if extra:
        slots = torch.cat([slots, slots.new_full((extra,), ADDED)])
    group = torch.arange(cls, n + cls, device=tower.device)
    return TowerTokens(
        has_cls=bool(cls),
        slots=slots.expand(tiles, n + cls + extra),
        group=group.expand(tiles, n),
        counts=[n + cls + extra] * tiles,
    )


def reduce_tokens(
    tokens: TowerTokens, reduction: Reduction, hidden: Tensor | None = None,
    rectify: Rectify | None = None,
) -> TowerTokens:  # fmt: skip
    """Book-keeping of a reduction: which slot each new row stands for, where each patch went; and
    where attention is rectified, how many each stands for, by ``hidden`` [B, T, D]."""
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
    size = None
    if rectify is not None and hidden is not None:
        size = in_tower(rectify, tokens, group, rows, hidden)
    return TowerTokens(
        has_cls=tokens.has_cls,
        slots=slots,
        group=torch.where(tokens.group < 0, -1, moved),
        counts=counts,
        valid=valid,
        size=size,
    )


class TowerPass:
    """One forward of the vision encoder: the runs of all encoder stages, and the tokens alive."""

    def __init__(
        self, stages: tuple[EncoderStage, ...], tower: TowerInput, contracts: Contracts = UNNAMED,
        rectify: Rectify | None = None,
    ) -> None:  # fmt: skip
        self.tower, self.stages, self.contracts = tower, stages, contracts
        self.rectify = rectify
        self.runs = [contracts.run(stage, stage.start(tower)) for stage in stages]
        #: rows that stages added to every tile
        self.added = sum(stage.extra_tokens for stage in stages)
        #: the layer behind which they were cut off again
        self.added_until: int | None = None
        self.tokens = initial_tokens(tower, self.added)
        #: tokens after each layer, for the trace: (layer, tokens)
        self.history: list[tuple[int, TowerTokens]] = []
        self.residual: Tensor | None = None
        #: what the stages looked at last
        self.seen: Tensor | None = None
        self.outcomes: list[EncoderOutcome] = []
        self.reduced = False
        #: output of the feature layer, where a stage reduced it
        self.features: Tensor | None = None
        #: the same before that, for stages that wait for the last layer
        self.waiting: Tensor | None = None

    def runs_at(self, kind: str, layer: int) -> list[EncoderRun]:
        return [r for s, r in zip(self.stages, self.runs) if layer in getattr(s, kind)]

    # ------------------------------------------------------------------ added rows

    def append(self, embedded: Tensor) -> Tensor:
        """The embedded patches with the added rows behind them."""
        batch, _, width = embedded.shape
        return torch.cat([embedded, embedded.new_zeros(batch, self.added, width)], dim=1)

    def _cut_added(self, layer: int, hidden: Tensor) -> Tensor:
        """Without the added rows, which no reduction has taken care of."""
        self.tokens, self.added_until = initial_tokens(self.tower), layer
        return hidden[:, : self.tokens.rows]

    # ------------------------------------------------------------------ one layer

    def bias(self, layer: int) -> Tensor | None:
        """Sum of the biases that the runs ask for, [B, 1, 1, T], or None."""
        bias = None
        for run in self.runs_at("bias_layers", layer):
            own = run.bias(layer, self.tokens)
            self.contracts.bias(run, layer, own, self.tokens)
            bias = own if bias is None or own is None else bias + own
        return bias

    def attention(self, layer: int, call: Call) -> None:
        self.seen = call.query
        attention = Attention(
            call.query, call.key, call.value, call.scaling, causal=False, mask=self.tokens.valid
        )
        for run in self.runs_at("taps", layer):
            run.attention(layer, attention, self.tokens)

    def between(self, layer: int, args: tuple[Tensor, ...]) -> tuple[Tensor] | None:
        """Before the norm in front of the MLP."""
        self.residual, hidden = None, args[0]
        self.seen = hidden
        for run in self.runs_at("between_layers", layer):
            reduction = run.between(layer, hidden, self.tokens)
            if reduction is not None:
                hidden = self.residual = self._apply(run, "between", layer, hidden, reduction)
        return None if self.residual is None else (hidden,)

    def activation(self, layer: int, args: tuple[Tensor, ...]) -> tuple[Tensor] | None:
        """Before the second linear map of the MLP."""
        activations, changed = args[0], False
        for run in self.runs_at("activation_layers", layer):
            new = run.activation(layer, activations, self.tokens)
            if new is not None:
                self.contracts.activation(run, layer, new, activations)
                activations, changed = new, True
        return (activations,) if changed else None

    def mlp(self, layer: int, args: Any, output: Tensor) -> Tensor | None:
        if self.residual is None:
            return None
        # The block adds its own, longer residual next. Keep the true sum, and give the block
        # a single row that broadcasts; the block hook then replaces what it makes of it.
        self.residual = self.residual + output
        return output[:, :1]

    def after(self, layer: int, args: Any, output: Any) -> Any:
        """After the whole block."""
        whole = isinstance(output, tuple)
        hidden, changed = output[0] if whole else output, self.residual is not None
        self.seen = hidden
        if self.residual is not None:
            hidden, self.residual = self.residual, None
        facts = self.tower.facts
        read, last = layer == facts.feature_layer, layer == facts.encoder_layers - 1
        late = [r for s, r in zip(self.stages, self.runs) if s.after_tower is not None]
        for run in (*self.runs_at("after_layers", layer), *(late if read and last else ())):
            reduction = run.after(layer, hidden, self.tokens)
            if reduction is not None:
                hidden, changed = self._apply(run, "after", layer, hidden, reduction), True
        if read and self.added and not self.reduced and (last or not late):
            hidden, changed = self._cut_added(layer, hidden), True
        if read and late and not last:
            self.waiting = hidden
        if read and changed:
            self.features = hidden
        if last and self.waiting is not None:
            # nobody reads what the last layer makes; what is read is reduced behind it
            for run in late:
                reduction = run.after(layer, self.waiting, self.tokens)
                if reduction is not None:
                    self.waiting = self._apply(run, "after", layer, self.waiting, reduction)
                    self.features = self.waiting
            if self.added and not self.reduced:
                self.features = self._cut_added(layer, self.waiting)
            self.waiting = None
        if not changed:
            return None
        return (hidden, *output[1:]) if whole else hidden

    def _apply(
        self, run: EncoderRun, hook: str, layer: int, hidden: Tensor, reduction: Reduction
    ) -> Tensor:
        self.contracts.reduction(run, hook, layer, reduction, hidden, self.tokens)
        self.tokens = reduce_tokens(self.tokens, reduction, hidden, self.rectify)
        self.history.append((layer, self.tokens))
        self.reduced = True
        return gather_rows(hidden, reduction.rows) if reduction.hidden is None else reduction.hidden

    # ------------------------------------------------------------------ at the end

    @property
    def cut_rows(self) -> int:
        """Rows that the model cuts off in front of the features: 1 for a class token that it does
        not keep."""
        return self.tokens.first_patch - int(self.tower.facts.cls_in_features)

    def full_grid(self, projected: Tensor) -> Tensor:
        """The model packs full grids after the projector: one with the survivors in their slots,
        [tiles, F, D] from ``projected`` [tiles, T, D]."""
        tokens, facts, cut = self.tokens, self.tower.facts, self.cut_rows
        slots = tokens.slots[:, cut:].to(projected.device) + int(facts.cls_in_features)
        spare = facts.tokens_per_tile
        if cut or self.added:
            slots = torch.where(slots < 0, spare, slots)
        if not cut and tokens.valid is not None:
            slots = torch.where(tokens.valid.to(projected.device), slots, spare)
        full = projected.new_zeros(projected.shape[0], spare + 1, projected.shape[2])
        index = slots[:, :, None].expand(-1, -1, projected.shape[2])
        return full.scatter(1, index, projected)[:, :spare]

    def finish(self) -> None:
        self.outcomes = [
            self.contracts.outcome(run, run.finish(self.tokens), self.tokens, self.tower.facts)
            for run in self.runs
        ]


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
        embeddings: Any = None,
    ) -> None:
        """``embeddings``: the module whose output, positions added, rows can be put behind."""
        self.layers, self.stages, self.current, self.tap = layers, stages, current, tap
        self.embeddings = embeddings
        #: attention of transformers 4.37, which takes masks of full shape only
        self.legacy = legacy
        if stages:
            check_backend(tapped_backend(layers[0].self_attn), "vision tower")

    def install(self) -> list[Any]:
        handles: list[Any] = []
        ragged = any(stage.reduces for stage in self.stages)
        adds = any(stage.extra_tokens for stage in self.stages)
        if adds:
            handles.append(self.embeddings.register_forward_hook(self._append_hook()))
        for number, layer in enumerate(self.layers):
            taps, between, after = (
                any(number in getattr(stage, kind) for stage in self.stages)
                for kind in ("taps", "between_layers", "after_layers")
            )
            late = {stage.after_tower for stage in self.stages} - {None}
            after = after or number in late or bool(late and number == len(self.layers) - 1)
            if ragged:
                mask = self._mask_hook(number)
                handles.append(layer.self_attn.register_forward_pre_hook(mask, with_kwargs=True))
            if taps:
                handles.append(self.tap(layer.self_attn, self._tap(number), self._running))
            if between:
                norm, mlp = layer.layer_norm2, layer.mlp
                handles.append(norm.register_forward_pre_hook(self._hook("between", number)))
                handles.append(mlp.register_forward_hook(self._hook("mlp", number)))
            if any(number in stage.activation_layers for stage in self.stages):
                second = _second_map(layer.mlp)
                handles.append(second.register_forward_pre_hook(self._hook("activation", number)))
            # the pass knows behind which layer added rows are cut off
            if between or after or adds:
                # first of the hooks, so that recorded hidden states are the reduced ones
                hook = self._hook("after", number)
                handles.append(layer.register_forward_hook(hook, prepend=True))
        return handles

    def _append_hook(self) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            current = self.current()
            return None if current is None else current.append(output)

        return traceable(hook)

    def _running(self) -> bool:
        return self.current() is not None

    def _tap(self, number: int) -> Any:
        def tap(call: Call) -> None:
            if (current := self.current()) is not None:
                current.attention(number, call)

        return tap

    def _hook(self, name: str, number: int) -> Any:
        """A method of the pass in progress as a hook, or nothing where there is none."""

        def hook(module: nn.Module, *call: Any) -> Any:
            current = self.current()
            return None if current is None else getattr(current, name)(number, *call)

        return traceable(hook)

    def _mask_hook(self, number: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            current = self.current()
            if current is None:
                return None
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            bias = current.bias(number)
            backend = check_backend(tapped_backend(module), "vision tower")
            mask = encoder_mask(backend, current.tokens.valid, bias, hidden.dtype)
            if mask is None:
                return None
            kwargs["attention_mask"] = (
                mask.expand(-1, 1, hidden.shape[1], -1) if self.legacy else mask
            )
            return args, kwargs

        return traceable(hook)


def _second_map(mlp: Any) -> Any:
    """The linear map of an MLP that reads its activations.

    Raises:
        UnsupportedModelError: the MLP is built in another way.
    """
    if not hasattr(mlp, "fc2"):
        raise UnsupportedModelError(
            f"{type(mlp).__name__} of the vision tower is no MLP of two linear maps, fc1 and fc2, "
            "between which a method could change its activations"
        )
    return mlp.fc2
