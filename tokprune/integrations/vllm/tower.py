"""Hooks on vLLM's CLIP and SigLIP towers, for stages that look into them or drop patches there."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tokprune.engine.encoder import TowerPass
from tokprune.engine.tap import Call
from tokprune.integrations.vllm.host import PlanHost


class TowerHooks:
    """On the blocks that any plan of a server needs; at rest they do nothing."""

    def __init__(self, tower: Any) -> None:
        self.tower = tower
        self.current: TowerPass | None = None
        self._hooked: set[tuple[str, int]] = set()

    @property
    def layers(self) -> Any:
        return self.tower.vision_model.encoder.layers

    def install(self, host: PlanHost) -> None:
        """For the stages of one more plan."""
        for stage in host.plan.encoder:
            for number in stage.taps:
                if self._new("tap", number):
                    attention = self.layers[number].self_attn
                    attention.qkv_proj.register_forward_hook(self._tap(number, attention))
            behind = set(stage.after_layers)
            if stage.after_tower is not None:
                behind |= {stage.after_tower, len(self.layers) - 1}
            for number in behind:
                if self._new("after", number):
                    self.layers[number].register_forward_hook(self._after(number))

    def _new(self, kind: str, number: int) -> bool:
        known = (kind, number) in self._hooked
        self._hooked.add((kind, number))
        return not known

    def _tap(self, number: int, attention: Any) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            if self.current is None or not self.current.runs_at("taps", number):
                return
            query, key, value = (heads(part, attention) for part in output[0].chunk(3, dim=-1))
            self.current.attention(number, Call(query, key, value, None, attention.scale))

        return hook

    def _after(self, number: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> Any:
            return None if self.current is None else self.current.after(number, args, output)

        return hook

    def run(self, tower: TowerPass, pixels: Tensor, layer: int) -> Tensor:
        """Rows of tiles [tiles, T, D] that enter the projector, of the ``layer`` that the model
        reads (as transformers counts them), reduced by the pass ``tower``."""
        whole = len(self.layers) == tower.tower.facts.encoder_layers
        self.current = tower
        try:
            hidden: Tensor = self.tower(
                pixels, select_layers=[layer] if whole else None, feature_select_strategy="full"
            )
        finally:
            self.current = None
        tower.finish()
        rows = hidden if tower.features is None else tower.features
        return rows[:, tower.cut_rows :]


def heads(x: Tensor, attention: Any) -> Tensor:
    """Queries, keys or values [B, T, D] by head, [B, H, T, d]: of all ranks of a tensor-parallel
    group, each of which has some. By its own alone every rank would rank tokens another way."""
    own = x.unflatten(-1, (attention.num_heads_per_partition, attention.head_dim)).transpose(1, 2)
    if attention.tp_size > 1:
        from vllm.distributed import tensor_model_parallel_all_gather

        own = tensor_model_parallel_all_gather(own.contiguous(), dim=1)
    return own
