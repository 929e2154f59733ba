"""Widths of a model's layers: what multiply-accumulates (MACs) and cache bytes are counted from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from tokprune.engine.model import Parts


def _linear(module: nn.Module) -> int:
    """MACs per row of all linear maps inside a module (a gated MLP has three)."""
    total = 0
    for part in module.modules():
        if hasattr(part, "in_features") and not list(part.children()):
            linear: Any = part  # nn.Linear, or a quantised relative of it
            total += linear.in_features * linear.out_features
    return total


def _convolution(module: nn.Module | None) -> int:
    """MACs per output cell of the convolutions inside a module."""
    parts = [] if module is None else list(module.modules())
    return sum(part.weight.numel() for part in parts if isinstance(part, nn.Conv2d))


@dataclass(frozen=True)
class LayerShape:
    """One transformer block.

    ``projections``, ``mlp``: MACs per token of q, k, v, o and of the MLP; ``pair``: MACs per
    query–key pair, score and weighted sum of all heads; ``kv``: numbers cached per token.
    """

    projections: int
    pair: int
    mlp: int
    kv: int

    @classmethod
    def of(cls, block: Any) -> LayerShape:
        attention = block.self_attn
        out = attention.o_proj if hasattr(attention, "o_proj") else attention.out_proj
        return cls(
            projections=_linear(attention),
            pair=attention.q_proj.out_features + out.in_features,
            mlp=_linear(block.mlp),
            kv=attention.k_proj.out_features + attention.v_proj.out_features,
        )

    def macs(self, queries: int, keys: int | None = None, mlp_rows: int | None = None) -> int:
        """MACs of this block for one sequence: ``queries`` tokens that attend to ``keys`` tokens
        (default: each other); the MLP sees ``mlp_rows`` (default: all queries)."""
        keys = queries if keys is None else keys
        mlp_rows = queries if mlp_rows is None else mlp_rows
        return queries * self.projections + queries * keys * self.pair + mlp_rows * self.mlp


@dataclass(frozen=True)
class PoolingShape:
    """SigLIP's attention-pooling head, which runs after the encoder although LLaVA ignores it."""

    width: int
    mlp: int

    def macs(self, rows: int) -> int:
        # one query per tile: q and o once, k and v per row, two products with the rows
        return 2 * self.width**2 * (1 + rows) + 2 * rows * self.width + self.mlp


@dataclass(frozen=True)
class ModelShape:
    """Widths of a model, read from its modules: MACs per patch, per row, per token."""

    patch_embedding: int
    encoder: tuple[LayerShape, ...]
    pooling: PoolingShape | None
    projector: int
    decoder: tuple[LayerShape, ...]
    lm_head: int
    #: per cell that a convolution makes of a frame's patches, where the model pools that way
    resampler: int = 0

    @classmethod
    def of(cls, model: Any, parts: Parts) -> ModelShape:
        tower: Any = getattr(parts.tower, "vision_model", parts.tower)
        head = getattr(tower, "head", None)
        out = model.get_output_embeddings()
        return cls(
            patch_embedding=tower.embeddings.patch_embedding.weight.numel(),
            encoder=tuple(LayerShape.of(layer) for layer in parts.encoder_layers),
            pooling=None
            if head is None
            else PoolingShape(head.attention.embed_dim, _linear(head.mlp)),
            projector=_linear(parts.projector),
            decoder=tuple(LayerShape.of(layer) for layer in parts.decoder_layers),
            lm_head=0 if out is None else _linear(out),
            resampler=_convolution(parts.resampler),
        )

    @property
    def kv_numbers(self) -> int:
        """Numbers cached per token over all layers."""
        return sum(layer.kv for layer in self.decoder)
