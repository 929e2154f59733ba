"""Runs the plan of a method outside transformers: on what another engine makes of an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokprune.engine.check import Contracts, check_plan
from tokprune.engine.contracts import Rectify, TowerInput
from tokprune.engine.encoder import TowerPass
from tokprune.engine.family import BoundModel
from tokprune.engine.images import ImageRecord, build_records
from tokprune.engine.model import ImageLayout
from tokprune.engine.shorten import merged_rows, run_stages
from tokprune.errors import ContractError
from tokprune.integrations.vllm import refusals
from tokprune.methods.base import Method


@dataclass(frozen=True, eq=False)
class Left:
    """What is left of an image: ``features`` [k, D] in the order in which they enter the prompt;
    ``place`` [k]: the token of the whole image that each stands for, by its number there."""

    features: Tensor
    place: Tensor
    #: of every token of the whole image the one that it has merged into, and its weight there
    group: Tensor | None = None
    weight: Tensor | None = None

    def follow(self, values: Tensor) -> Tensor:
        """What becomes of further features [n, D] of the whole image: they move and merge with its
        tokens, [k, D]."""
        if self.group is None:
            return values[self.place]
        return merged_rows(values.float(), self.group, self.weight, len(self.place)).to(
            values.dtype
        )


class PlanHost:
    """A method on a model whose tower, projector and prompts are somebody else's business."""

    def __init__(self, method: Method, bound: BoundModel) -> None:
        """
        Raises:
            UnsupportedModelError: the method cannot work there; says why.
            ValueError: an option does not fit the model.
        """
        facts = bound.facts
        self.bound, self.facts, self.method = bound, facts, method.on(facts)
        plan = check_plan(self.method, self.method.plan(facts), facts)
        self.plan = replace(plan, rectify=Rectify.of(self.method.rectify))
        refusals.check(self.method, self.plan, facts)
        self.contracts = Contracts.of(repr(self.method), None)
        reducing = [stage for stage in self.plan.encoder if stage.reduces]
        self.spatial = all(stage.order == "spatial" for stage in reducing)

    @property
    def wants_raw(self) -> bool:
        """Whether it needs what the projector made of every tile, before the model packs it."""
        return any(stage.wants_raw for stage in self.plan.prompt)

    def count(self, layout: ImageLayout) -> int:
        """Tokens that are left of an image.

        Raises:
            UnsupportedModelError: its layout does not tell.
        """
        left = self.method.fixed_count(self.facts, layout)
        if left is None:
            refusals.not_fixed(self.method)
        return left

    def start(self, layouts: Sequence[ImageLayout], device: torch.device) -> TowerPass:
        """A pass of the vision encoder over the tiles of these images, for models in whose tower
        stages can work."""
        facts = self.facts.tower
        assert facts is not None
        given = TowerInput(
            facts,
            tuple(i for i, layout in enumerate(layouts) for _ in range(layout.tiles)),
            device,
            tile_grids=tuple(layout.tile_grid for layout in layouts),
            sizes=tuple(layout.size for layout in layouts),
            videos=(False,) * len(layouts),
        )
        return TowerPass(self.plan.encoder, given, self.contracts)

    def reduce(
        self,
        layouts: Sequence[ImageLayout],
        packed: Sequence[Tensor | None],
        tower: TowerPass | None = None,
        projected: Tensor | None = None,
        newline: Tensor | None = None,
    ) -> list[Left]:
        """What is left of each of these images.

        Args:
            packed: [n, D] of each, as the model packs them; None where the tower has reduced them.
            tower: the pass that has run and is finished, where there was one.
            projected: then the projector's output [tiles, T, D].
            newline: the learned newline embedding [D].

        Raises:
            ContractError: it is another number than :meth:`count` says.
        """
        records = self._records(list(layouts), packed, tower, projected, newline)
        images, wholes = [], []
        for record, own in zip(records, packed, strict=True):
            kept = own if record.features is None else record.features
            assert kept is not None
            columns = torch.arange(record.count, device=kept.device)
            images.append(record.tokens(kept, columns))
            wholes.append(kept)
        images, answers = run_stages(
            images, [False] * len(images), self.plan.prompt, self.contracts, None
        )
        left = []
        for layout, image, whole, answer in zip(layouts, images, wholes, answers):
            told = self.count(layout)
            if image.count != told:
                raise ContractError(
                    f"{self.contracts.method} leaves {image.count} tokens of an image of which "
                    f"fixed_count says {told}; both should be the same"
                )
            merged = answer if answer is not None and answer.features is not None else None
            left.append(
                Left(
                    image.features.to(whole.dtype), image.column,
                    None if merged is None else merged.group,
                    None if merged is None else merged.weight,
                )
            )  # fmt: skip
        return left

    def _records(
        self, layouts: list[ImageLayout], packed: Sequence[Tensor | None],
        tower: TowerPass | None, projected: Tensor | None, newline: Tensor | None,
    ) -> list[ImageRecord]:  # fmt: skip
        if tower is not None and projected is not None:
            return build_records(layouts, tower, projected, newline, self.spatial, self.wants_raw)
        devices = [own.device for own in packed if own is not None]
        return [
            ImageRecord(layout, self.facts.tower, device)
            for layout, device in zip(layouts, devices, strict=True)
        ]
