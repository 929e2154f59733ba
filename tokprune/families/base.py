"""What families share: parts of LLaVA-shaped models, and facts read from their configs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from tokprune.engine.family import Family
from tokprune.engine.model import ModelFacts, Parts
from tokprune.errors import UnsupportedModelError


class LlavaShaped(Family):
    """LLaVA and its relatives in transformers ≥ 4.57: a tower, a projector, a decoder, and a
    ``config.vision_config`` with square images and patches."""

    def parts(self, model: nn.Module) -> Parts:
        return llava_parts(model)

    def facts(self, model: nn.Module, parts: Parts) -> ModelFacts:
        config: Any = model.config
        vision = config.vision_config
        side = vision.image_size // vision.patch_size
        has_cls = tower_has_cls(parts.tower)
        strategy = config.vision_feature_select_strategy
        cls_in_features = has_cls and strategy == "full"
        tokens = side * side + int(cls_in_features)
        if not has_cls and strategy == "default":
            raise UnsupportedModelError(
                "config.vision_feature_select_strategy='default' cuts the first patch of a vision "
                f"tower without class token ({type(parts.tower).__name__}); it should be 'full'"
            )
        layers = len(parts.encoder_layers)
        tiles = self.max_tiles(model)
        newlines = side * max(tiles - 1, 0) if self.tiled else 0
        return ModelFacts(
            family=self.name,
            encoder_layers=layers,
            feature_layer=feature_layer(config.vision_feature_layer, layers),
            grid=(side, side),
            tokens_per_tile=tokens,
            has_cls=has_cls,
            cls_in_features=cls_in_features,
            max_tiles=tiles,
            tiled=self.tiled,
            max_visual_tokens=tiles * tokens + newlines,
            decoder_layers=len(parts.decoder_layers),
        )


def with_videos(facts: ModelFacts, parts: Parts, frame_grid: tuple[int, int]) -> ModelFacts:
    """Facts of a model that takes videos, too: how many frames they have nobody knows, but no more
    tokens than the decoder has positions."""
    positions = getattr(parts.language_model.config, "max_position_embeddings", 0)
    return replace(
        facts, videos=True, frame_grid=frame_grid,
        max_visual_tokens=max(facts.max_visual_tokens, positions),
    )  # fmt: skip


def feature_layer(setting: int | list[int], layers: int) -> int | None:
    """0-based encoder layer whose output a transformers ``vision_feature_layer`` names.

    ``hidden_states`` has L+1 entries, the first being the embeddings, hence −2 → layer L−2.
    None for a list of layers.
    """
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


def decoder_layers_of(language_model: Any) -> list[nn.Module]:
    """The blocks of a Llama-like decoder."""
    layers = list(getattr(language_model, "layers", []))
    if (
        not layers
        or not all(hasattr(layers[0], n) for n in ("self_attn", "input_layernorm", "mlp"))
        or not all(hasattr(layers[0].self_attn, n) for n in ("q_proj", "k_proj", "v_proj"))
    ):
        raise UnsupportedModelError(
            f"decoder {type(language_model).__name__} is not supported: expected Llama, Mistral "
            "or Qwen2 (blocks with input_layernorm, self_attn.{q,k,v}_proj, mlp)"
        )
    kinds = set(getattr(language_model.config, "layer_types", None) or [])
    if len(kinds) > 1:
        raise UnsupportedModelError(
            f"decoder {type(language_model).__name__} mixes attention kinds ({sorted(kinds)}); "
            "supported are decoders that slide in every layer or in none"
        )
    if hasattr(layers[0].self_attn, "q_norm"):
        raise UnsupportedModelError(
            f"decoder {type(language_model).__name__} normalises its queries and keys; "
            "supported decoders are Llama, Mistral and Qwen2"
        )
    return layers


def llava_parts(model: Any) -> Parts:
    """Parts of LLaVA-shaped models (LLaVA-1.5, LLaVA-NeXT) in transformers ≥ 4.57."""
    multimodal = model.model
    language_model = multimodal.language_model
    return Parts(
        multimodal=multimodal,
        tower=multimodal.vision_tower,
        encoder_layers=encoder_layers_of(multimodal.vision_tower),
        projector=multimodal.multi_modal_projector,
        language_model=language_model,
        decoder_layers=decoder_layers_of(language_model),
        rotary=language_model.rotary_emb,
        image_token_id=model.config.image_token_id,
    )
