"""Stages that drop rows of an encoder which packs its images into one sequence.

Patches leave after a block; the blocks behind it get bounds and tables of the rows that are left.
The merger then makes a token of as many of them as ever, in order, and the tokens of a frame take
its first cells.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from tokprune.engine.encoder import reduce_tokens
from tokprune.engine.images import ImageRecord
from tokprune.engine.model import ObservedTower
from tokprune.engine.observed import ObservedPass


class PackedPass(ObservedPass):
    """One forward of such an encoder. All lengths are those of frames, in order."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.whole = [group.tokens.rows for group in self.groups]
        #: rows left after each layer that dropped some, by frame
        self.history: list[tuple[int, list[Tensor]]] = []
        self.merged: Tensor | None = None

    @property
    def lengths(self) -> list[int]:
        return [group.tokens.rows for group in self.groups]

    def after(self, layer: int, hidden: Tensor) -> Tensor | None:
        """After a block: what is left of its output [rows, D]; None: all."""
        self.seen, parts, changed = hidden, [], False
        for group, part in zip(self.groups, hidden.split(self.lengths)):
            for stage, run in zip(self.stages, group.runs):
                if layer not in stage.after_layers:
                    continue
                reduction = run.after(layer, part[None], group.tokens)
                if reduction is not None:
                    self.contracts.reduction(
                        run, "after", layer, reduction, part[None], group.tokens
                    )
                    group.tokens = reduce_tokens(group.tokens, reduction, part[None], self.rectify)
                    part, changed = part[reduction.rows[0]], True
            parts.append(part)
        if not changed:
            return None
        self.history.append((layer, [group.tokens.slots[0] for group in self.groups]))
        return torch.cat(parts)

    def arguments(self, kwargs: dict[str, Any], device: torch.device) -> None:
        """Make a block's arguments those of the rows that are left."""
        if not self.history:
            return
        starts = torch.tensor([0, *self.whole]).cumsum(0)[:-1].tolist()
        rows = torch.cat([slots.to(device) + s for slots, s in zip(self.history[-1][1], starts)])
        bounds = torch.tensor([0, *self.lengths]).cumsum(0)
        known = kwargs["cu_seqlens"]
        kwargs["cu_seqlens"] = bounds.to(known.device, known.dtype)
        longest = kwargs.get("max_seqlen")
        if longest is not None:
            most = max(self.lengths)
            kwargs["max_seqlen"] = longest.new_tensor(most) if torch.is_tensor(longest) else most
        for name in ("position_embeddings", "rotary_pos_emb"):
            table = kwargs.get(name)
            if isinstance(table, tuple):
                kwargs[name] = tuple(part[rows] for part in table)
            elif table is not None:
                kwargs[name] = table[rows]

    def spread(self, merged: Tensor) -> Tensor | None:
        """The merger's output with the tokens of every frame in its first cells [all cells, D]."""
        if not self.history:
            return None
        self.merged, area = merged, self.facts.merges**2
        full = merged.new_zeros(sum(self.whole) // area, merged.shape[1])
        start = 0
        parts = merged.split([rows // area for rows in self.lengths])
        for part, rows in zip(parts, self.whole):
            full[start : start + len(part)] = part
            start += rows // area
        return full

    def fill(self, records: list[ImageRecord]) -> None:
        if self.merged is None:
            super().fill(records)
            return
        area = self.facts.merges**2
        parts = list(self.merged.split([rows // area for rows in self.lengths]))
        first = 0
        for record in records:
            frames = slice(first, first + record.layout.tiles)
            first, start, cells = frames.stop, 0, []
            for part, rows in zip(parts[frames], self.whole[frames]):
                cells.append(torch.arange(start, start + len(part), device=part.device))
                start += rows // area
            record.features, record.cell = torch.cat(parts[frames]), torch.cat(cells)
            sizes = [group.tokens.size for group in self.groups[frames]]
            if all(size is not None for size in sizes):
                # a token is made of the next patches, in order
                means = [size[0].view(-1, area).mean(1) for size in sizes if size is not None]
                record.stands_for = torch.cat(means).to(record.features.device)
            record.history = [
                (layer, pad_sequence(slots[frames], batch_first=True, padding_value=-1))
                for layer, slots in self.history
            ]


def install_packed(tower: ObservedTower, current: Callable[[], ObservedPass | None]) -> list[Any]:
    """Hooks on the blocks and the merger; ``current()``: the pass that runs."""

    def running() -> PackedPass | None:
        now = current()
        return now if isinstance(now, PackedPass) else None

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if (now := running()) is not None:
            hidden = args[0] if args else kwargs["hidden_states"]
            now.arguments(kwargs, hidden.device)
        return args, kwargs

    def after(number: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            now = running()
            return None if now is None else now.after(number, output)

        return hook

    def spread(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        now = running()
        return None if now is None else now.spread(output)

    handles = [tower.merger.register_forward_hook(spread)]
    for number, block in enumerate(tower.blocks):
        handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(block.register_forward_hook(after(number)))
    return handles
