"""What families share: parts of LLaVA-shaped models, and facts read from their configs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from tokprune.engine.family import Family
from tokprune.engine.model import Block, ModelFacts, Parts, Tower, TowerFacts
from tokprune.errors import UnsupportedModelError


class LlavaShaped(Family):
    """LLaVA and its relatives in transformers ≥ 4.57: a tower, a projector, a decoder, and a
    ``config.vision_config`` with square images and patches."""

    #: tiles and newline tokens (anyres)
    tiled: bool = False

    def parts(self, model: nn.Module) -> Parts:
        return llava_parts(model)

    def max_tiles(self, model: nn.Module) -> int:
        return 1

    def facts(self, model: nn.Module, parts: Parts) -> ModelFacts:
        config: Any = model.config
        assert parts.tower is not None
        strategy = config.vision_feature_select_strategy
        if strategy == "default" and not tower_has_cls(parts.tower.module):
            raise UnsupportedModelError(
                "config.vision_feature_select_strategy='default' cuts the first patch of a vision "
                f"tower without class token ({type(parts.tower.module).__name__}); it should be "
                "'full'"
            )
        tower = tower_facts(
            parts.tower, config.vision_config, config.vision_feature_layer,
            keeps_cls=strategy == "full", max_tiles=self.max_tiles(model), tiled=self.tiled,
        )  # fmt: skip
        return llava_facts(self.name, parts, tower)


def llava_facts(family: str, parts: Parts, tower: TowerFacts) -> ModelFacts:
    """Facts of a LLaVA: of an image, so many tiles, and newlines where their crops are stitched."""
    newlines = tower.grid[0] * (tower.max_tiles - 1) if tower.tiled else 0
    most = tower.max_tiles * tower.tokens_per_tile + newlines
    return decoder_facts(family, parts, most, tower=tower)


def tower_facts(
    tower: Tower, vision_config: Any, layer: int | list[int], keeps_cls: bool = True, **more: Any
) -> TowerFacts:
    """Facts of a CLIP or SigLIP tower of square images, whose layer ``layer`` (as transformers'
    ``vision_feature_layer``) is read; ``keeps_cls``: with its class token, if it has one."""
    side = vision_config.image_size // vision_config.patch_size
    has_cls = tower_has_cls(tower.module)
    layers = len(tower.layers)
    return TowerFacts(
        encoder_layers=layers,
        feature_layer=feature_layer(layer, layers),
        grid=(side, side),
        tokens_per_tile=side * side + int(has_cls and keeps_cls),
        has_cls=has_cls,
        cls_in_features=has_cls and keeps_cls,
        **more,
    )


def decoder_facts(family: str, parts: Parts, most: int | None = None, **more: Any) -> ModelFacts:
    """Facts of a decoder; ``most``: visual tokens of an image (None: no more is known than that
    the decoder has so many positions)."""
    blocks = parts.decoder_layers
    without = any(not block.has_attention for block in blocks)
    return ModelFacts(
        family=family,
        decoder_layers=len(blocks),
        max_visual_tokens=positions_of(parts) if most is None else most,
        videos=parts.video_token_id is not None,
        attention_layers=frozenset(n for n, block in enumerate(blocks) if block.has_attention)
        if without
        else None,
        **more,
    )


def positions_of(parts: Parts) -> int:
    """Positions that the decoder was made for."""
    return int(getattr(parts.language_model.config, "max_position_embeddings", 0))


def with_videos(facts: ModelFacts, parts: Parts, frame_grid: tuple[int, int]) -> ModelFacts:
    """Facts of a model that takes videos, too: how many frames they have nobody knows, but no more
    tokens than the decoder has positions."""
    most = max(facts.max_visual_tokens, positions_of(parts))
    return replace(facts, videos=True, frame_grid=frame_grid, max_visual_tokens=most)


def feature_layer(setting: int | list[int], layers: int) -> int | None:
    """0-based encoder layer whose output a transformers ``vision_feature_layer`` names.

    ``hidden_states`` has L+1 entries, the first being the embeddings, hence −2 → layer L−2.
    None for a list of layers.

    Raises:
        UnsupportedModelError: there is no such layer.
    """
    several = setting if isinstance(setting, (list, tuple)) else [setting]
    if not all(isinstance(n, int) and -layers - 1 <= n <= layers for n in several):
        raise UnsupportedModelError(
            f"config.vision_feature_layer={setting!r} should lie between {-layers - 1} and "
            f"{layers}: the vision tower has {layers} layers"
        )
    if not isinstance(setting, int):
        return None
    return (setting if setting >= 0 else layers + 1 + setting) - 1


def tower_has_cls(tower: nn.Module) -> bool:
    """Whether the vision tower's row 0 is a class token (CLIP yes, SigLIP no)."""
    inner = getattr(tower, "vision_model", tower)
    return hasattr(inner.embeddings, "class_embedding")


def encoder_layers_of(tower: nn.Module) -> list[nn.Module]:
    """The blocks of a CLIP or SigLIP tower, under 4.x and 5.x layouts."""
    inner = getattr(tower, "vision_model", tower)
    encoder = getattr(inner, "encoder", None)
    layers = list(getattr(encoder, "layers", []))
    names = ("self_attn", "layer_norm1", "layer_norm2", "mlp")
    if not layers or not all(hasattr(layers[0], n) for n in names):
        raise UnsupportedModelError(
            f"vision tower {type(tower).__name__} is not supported: expected a CLIP or SigLIP "
            "vision model (blocks with self_attn, layer_norm1, layer_norm2, mlp)"
        )
    return layers


def decoder_blocks(language_model: Any) -> list[Block]:
    """The blocks of a decoder: layers with ``self_attn`` (or linear attention) and ``mlp``.

    Raises:
        UnsupportedModelError: they are built in another way.
    """
    layers = list(getattr(language_model, "layers", []))
    config = language_model.config
    kinds = getattr(config, "layer_types", None) or [None] * len(layers)
    blocks = []
    for layer, kind in zip(layers, kinds):
        attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
        linear = getattr(layer, "linear_attn", None) if attention is None else None
        if mlp is None or (attention is None and linear is None):
            raise UnsupportedModelError(
                f"decoder {type(language_model).__name__} is not supported: expected blocks with "
                f"self_attn and mlp, found {', '.join(name for name, _ in layer.named_children())}"
            )
        attention = linear if attention is None else attention
        blocks.append(
            Block(
                module=layer,
                attention=attention,
                attention_out=_out(layer, _AFTER_ATTENTION, attention),
                mlp=mlp,
                mlp_out=_out(layer, _AFTER_MLP, mlp),
                window=_window(attention, config, kind),
                has_attention=linear is None,
            )
        )
    if not blocks:
        raise UnsupportedModelError(f"decoder {type(language_model).__name__} has no layers")
    return blocks


#: norms between a module and the residual
_AFTER_ATTENTION = ("post_self_attn_layernorm",)
_AFTER_MLP = ("post_feedforward_layernorm", "post_mlp_layernorm")


def _out(layer: Any, names: tuple[str, ...], module: Any) -> Any:
    """The module whose output enters the residual."""
    found = next((own for name in names if (own := getattr(layer, name, None)) is not None), module)
    if names is _AFTER_ATTENTION and hasattr(layer, "pre_feedforward_layernorm"):
        # only with a norm of its own before the MLP is this one behind the attention
        return layer.post_attention_layernorm
    return found


def _window(attention: Any, config: Any, kind: str | None) -> int | None:
    """Tokens that an attention module's window spans; None where it sees all."""
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window  # type: ignore[no-any-return]
    if kind is not None and kind != "sliding_attention":
        return None
    if not getattr(config, "use_sliding_window", True):
        return None
    return getattr(config, "sliding_window", None)


def decoder_parts(
    multimodal: Any, language_model: Any, image_token_id: int, video_token_id: int | None = None,
    encoder: Any = None,
) -> Parts:  # fmt: skip
    """Parts of a model in whose tower no stage works."""
    return Parts(
        multimodal, language_model, decoder_blocks(language_model), image_token_id, video_token_id,
        encoder,
    )  # fmt: skip


def llava_parts(model: Any) -> Parts:
    """Parts of LLaVA-shaped models (LLaVA-1.5, LLaVA-NeXT) in transformers ≥ 4.57."""
    multimodal = model.model
    tower = multimodal.vision_tower
    return Parts(
        multimodal=multimodal,
        language_model=multimodal.language_model,
        decoder_layers=decoder_blocks(multimodal.language_model),
        image_token_id=model.config.image_token_id,
        encoder=tower,
        tower=Tower(tower, encoder_layers_of(tower), multimodal.multi_modal_projector),
    )
