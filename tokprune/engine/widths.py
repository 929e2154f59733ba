"""Widths of a model's layers: what multiply-accumulates (MACs) and cache bytes are counted from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from tokprune.engine.model import Block, Parts

#: what the roles are called in blocks of encoders
_ATTENTION = ("self_attn", "attn", "attention")
_OUT = ("o_proj", "out_proj", "proj", "projection_layer")
_MLP = ("mlp", "feed_forward")
#: outside the encoder: from its output to visual tokens
_PROJECTORS = ("multi_modal_projector", "connector", "embed_vision")
#: what chooses experts is called
_ROUTER = ("gate", "router")
#: tokens that linear attention works on at once
_CHUNK = 64


def _first(owner: Any, names: tuple[str, ...]) -> Any:
    """The first of the named attributes that a module has, or None."""
    return next((own for name in names if (own := getattr(owner, name, None)) is not None), None)


def _maps(module: nn.Module) -> list[Any]:
    """All linear maps inside a module: nn.Linear, or quantised relatives of it."""
    return [x for x in module.modules() if hasattr(x, "in_features") and not list(x.children())]


def _linear(module: nn.Module) -> int:
    """MACs per row of all linear maps inside a module (a gated MLP has three)."""
    return sum(x.in_features * x.out_features for x in _maps(module))


def _mlp(block: Block) -> int:
    """MACs per token of a decoder layer's MLP, with the experts that a token meets: inside of the
    MLP, or beside it."""
    mlp = block.mlp
    dense = sum(
        _linear(own) for name, own in mlp.named_children() if name not in (*_ROUTER, "experts")
    )
    return dense + _experts(mlp) + _experts(block.module)


def _experts(owner: Any) -> int:
    """MACs per token of experts and of their router; 0 where a module has none."""
    experts: Any = getattr(owner, "experts", None)
    router: Any = _first(owner, _ROUTER)
    if experts is None:
        return 0 if router is None else _linear(router)
    rest = _linear(router) or router.weight.numel()
    if isinstance(experts, nn.ModuleList):
        number, total = len(experts), _linear(experts)
    else:
        weights = [p for p in experts.parameters() if p.dim() == 3]
        number, total = weights[0].shape[0], sum(p.numel() for p in weights)
    return int(rest + total // number * _active(owner, router, number))


def _active(owner: Any, router: Any, number: int) -> int:
    """How many of so many experts a token meets."""
    for known in (owner, router, getattr(router, "config", None)):
        for name in ("top_k", "num_experts_per_tok", "top_k_experts"):
            if (value := getattr(known, name, None)) is not None:
                return int(value)
    return number


def _convolution(module: nn.Module | None) -> int:
    """MACs per output cell of the convolutions inside a module."""
    parts = [] if module is None else list(module.modules())
    return sum(x.weight.numel() for x in parts if isinstance(x, nn.Conv2d | nn.Conv3d))


def _per_row(module: nn.Module) -> int:
    """MACs per row of everything inside a module: linear maps, convolutions whose windows touch,
    and matrices that a module multiplies by without a module for them."""
    bare = [
        p
        for part in module.modules()
        if list(part.children())
        for p in part._parameters.values()
        if p is not None and p.dim() == 2
    ]
    return _linear(module) + _convolution(module) + sum(p.numel() for p in bare)


@dataclass(frozen=True)
class Recurrence:
    """Linear attention, by the gated delta rule in chunks of 64 tokens, and the short convolution
    before it.

    Counted are its matrix products, at whole chunks: keys and queries with keys, values by those
    weights, and reading and writing the state. Left out is the solution of its triangular
    systems, and that one token after a prefill has elementwise products with the state alone.
    """

    heads: int
    key: int
    value: int
    channels: int
    kernel: int

    def macs(self, tokens: int) -> int:
        # the convolution runs over a margin, too
        place = self.channels * self.kernel
        if tokens == 1:
            return 2 * place
        chunks = -(-tokens // _CHUNK)
        pairs = _CHUNK**2 * (2 * self.key + self.value)
        state = 3 * _CHUNK * self.key * self.value
        return chunks * self.heads * (pairs + state) + (tokens + self.kernel - 1) * place


@dataclass(frozen=True)
class LayerShape:
    """One transformer block.

    ``projections``, ``mlp``: MACs per token of q, k, v, o and of the MLP; ``pair``: MACs per
    query–key pair, score and weighted sum of all heads; ``kv``: numbers cached per token;
    ``recurrence``: in place of pairs, where attention is linear.
    """

    projections: int
    pair: int
    mlp: int
    kv: int
    recurrence: Recurrence | None = None

    @classmethod
    def of(cls, attention: Any, mlp: Any) -> LayerShape:
        """Of a block of an encoder, whose heads all have keys of their own."""
        (out,) = _maps(_first(attention, _OUT))
        width = out.in_features
        return cls(projections=_linear(attention), pair=2 * width, mlp=_linear(mlp), kv=2 * width)

    @classmethod
    def of_decoder(cls, block: Block) -> LayerShape:
        """Of a decoder layer, whatever its projections are."""
        attention, mlp = block.attention, _mlp(block)
        projections = _linear(attention)
        if not block.has_attention:
            return cls(projections, 0, mlp, 0, _recurrence(attention))
        config, width = attention.config, attention.head_dim
        if hasattr(attention, "k_proj"):
            keys = _maps(attention.k_proj)[0].out_features
        else:
            pairs = getattr(attention, "num_key_value_heads", None) or config.num_key_value_heads
            keys = pairs * width
        pair = 2 * config.num_attention_heads * width
        return cls(projections, pair, mlp, 2 * keys)

    def macs(self, queries: int, keys: int | None = None, mlp_rows: int | None = None) -> int:
        """MACs of this block for one sequence: ``queries`` tokens that attend to ``keys`` tokens
        (default: each other); the MLP sees ``mlp_rows`` (default: all queries)."""
        keys = queries if keys is None else keys
        mlp_rows = queries if mlp_rows is None else mlp_rows
        recurrence = 0 if self.recurrence is None else self.recurrence.macs(queries)
        rows = queries * self.projections + mlp_rows * self.mlp
        return rows + queries * keys * self.pair + recurrence


def _recurrence(attention: Any) -> Recurrence | None:
    """Of a linear attention module; None where it is of an unknown kind."""
    convolution = getattr(attention, "conv1d", None)
    if convolution is None or not hasattr(attention, "head_k_dim"):
        return None
    return Recurrence(
        attention.num_v_heads, attention.head_k_dim, attention.head_v_dim,
        convolution.out_channels, convolution.kernel_size[0],
    )  # fmt: skip


@dataclass(frozen=True)
class PoolingShape:
    """SigLIP's attention-pooling head, which runs after the encoder although models ignore it."""

    width: int
    mlp: int

    @classmethod
    def of(cls, encoder: Any) -> PoolingShape | None:
        head = getattr(encoder, "head", None)
        return None if head is None else cls(head.attention.embed_dim, _linear(head.mlp))

    def macs(self, rows: int) -> int:
        # one query per tile: q and o once, k and v per row, two products with the rows
        return 2 * self.width**2 * (1 + rows) + 2 * rows * self.width + self.mlp


@dataclass(frozen=True)
class ModelShape:
    """Widths of a model, read from its modules: MACs per patch, per row, per token.

    ``projector``: per row that it sees; where no stage works in the encoder, of everything behind
    its blocks (mergers, downsampling, projector), per cell that they make. ``windowed``: encoder
    layers that see windows; ``class_tokens``: rows of the encoder beside the patches of an image;
    ``averaged``: width of the rows that it averages by a matrix product, 0 where it does not.
    """

    patch_embedding: int
    encoder: tuple[LayerShape, ...]
    pooling: PoolingShape | None
    projector: int
    decoder: tuple[LayerShape, ...]
    lm_head: int
    #: per cell that a convolution makes of a frame's patches, where the model pools that way
    resampler: int = 0
    windowed: frozenset[int] = frozenset()
    class_tokens: int = 0
    averaged: int = 0

    @classmethod
    def of(cls, model: Any, parts: Parts) -> ModelShape:
        out = model.get_output_embeddings()
        decoder = tuple(LayerShape.of_decoder(block) for block in parts.decoder_layers)
        lm_head = 0 if out is None else _linear(out)
        if parts.tower is None:
            return _with_whole_encoder(cls(0, (), None, 0, decoder, lm_head), parts)
        tower: Any = getattr(parts.tower.module, "vision_model", parts.tower.module)
        return cls(
            patch_embedding=parts.tower.embeddings.patch_embedding.weight.numel(),
            encoder=tuple(LayerShape.of(x.self_attn, x.mlp) for x in parts.tower.layers),
            pooling=PoolingShape.of(tower),
            projector=_linear(parts.tower.projector),
            decoder=decoder,
            lm_head=lm_head,
            resampler=_convolution(parts.tower.resampler),
        )

    @property
    def kv_numbers(self) -> int:
        """Numbers cached per token over all layers."""
        return sum(layer.kv for layer in self.decoder)


def _with_whole_encoder(shape: ModelShape, parts: Parts) -> ModelShape:
    """With the widths of an encoder that no stage works in, its parts told by their names."""
    encoder: Any = getattr(parts.encoder, "vision_model", parts.encoder)
    blocks = None if encoder is None else _blocks(encoder)
    if blocks is None:
        return shape
    patches = class_tokens = projector = 0
    for name, child in encoder.named_children():
        if "patch" in name or "embed" in name:
            patches += _per_row(child)
            class_tokens += any(own.endswith(_CLASS) for own, _ in child.named_parameters())
        elif name not in ("head", "pooler") and not any(m is blocks for m in child.modules()):
            projector += _per_row(child)
    outside = _first(parts.multimodal, _PROJECTORS)
    full = getattr(encoder, "fullatt_block_indexes", None)
    layers = range(len(blocks))
    return replace(
        shape,
        patch_embedding=patches,
        encoder=tuple(LayerShape.of(_first(x, _ATTENTION), _first(x, _MLP)) for x in blocks),
        pooling=PoolingShape.of(encoder),
        projector=projector + (0 if outside is None else _per_row(outside)),
        windowed=frozenset() if full is None else frozenset(layers) - frozenset(full),
        class_tokens=class_tokens,
        averaged=getattr(getattr(encoder, "pooler", None), "hidden_size", 0),
    )


_CLASS = ("cls_token", "class_embedding")


def _blocks(encoder: nn.Module) -> Any:
    """The list of an encoder's blocks: the first whose members have attention and an MLP."""
    for part in encoder.modules():
        if isinstance(part, nn.ModuleList) and len(part):
            block = part[0]
            if _first(block, _ATTENTION) is not None and _first(block, _MLP) is not None:
                return part
    return None
