"""The family of the original ``llava`` package's models."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokprune.engine.compat import LEGACY
from tokprune.engine.family import Family
from tokprune.engine.model import ImageLayout, ModelFacts, Parts
from tokprune.engine.tap import TapFunction
from tokprune.errors import UnsupportedModelError
from tokprune.families.base import decoder_layers_of, encoder_layers_of, feature_layer
from tokprune.integrations.llava_v1.attention import ProjectionTap, RotaryTables
from tokprune.integrations.llava_v1.packing import PLACEHOLDER, is_anyres, pack

if TYPE_CHECKING:
    from tokprune.engine.entry import Entry
    from tokprune.engine.session import Session

#: model classes that stand beside the supported ones, and why they are not among them
REFUSED = {
    "LlavaMptForCausalLM": "MPT projects q, k and v in one and adds ALiBi to its scores, while "
    "the engine reads q_proj, k_proj and rotary positions; use a Llama or Mistral checkpoint",
    "LlavaForConditionalGeneration": "transformers' own LLaVA classes are supported from "
    "transformers 4.57 on; here, load the checkpoint of the original llava package",
}


class LlavaV1(Family):
    """``LlavaLlamaForCausalLM`` and ``LlavaMistralForCausalLM`` with a CLIP tower."""

    name = "llava-v1"
    model_classes = ("LlavaLlamaForCausalLM", "LlavaMistralForCausalLM")
    legacy = True
    package = "llava"
    refused = REFUSED

    def unavailable(self) -> str | None:
        return None if LEGACY else (
            "classes of the original llava package run on transformers 4.37; patch them there "
            "(tokprune.load(..., package='llava')), or use a checkpoint of transformers' own LLaVA "
            "classes here"
        )  # fmt: skip

    def parts(self, model: Any) -> Parts:
        tower, decoder = model.get_vision_tower(), model.get_model()
        clip = getattr(tower, "vision_tower", None)
        if clip is None:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no vision tower yet; call "
                "model.get_vision_tower().load_model() before patching"
            )
        config = model.config
        if getattr(config, "pretraining_tp", 1) > 1:
            raise UnsupportedModelError(
                f"config.pretraining_tp={config.pretraining_tp} cuts the projections into slices, "
                "which no hook sees; set it to 1 (the results are the same)"
            )
        scaling = getattr(config, "rope_scaling", None)
        if scaling and scaling.get("type") == "dynamic":
            raise UnsupportedModelError(
                "config.rope_scaling of type 'dynamic' makes rotary frequencies depend on the "
                "number of tokens, which compression changes; use 'linear' or None"
            )
        layers: list[Any] = decoder_layers_of(decoder)
        return Parts(
            multimodal=model,
            tower=clip,
            encoder_layers=encoder_layers_of(clip),
            projector=decoder.mm_projector,
            language_model=decoder,
            decoder_layers=layers,
            rotary=RotaryTables(layers[0].self_attn.rotary_emb),
            image_token_id=PLACEHOLDER,
        )

    def facts(self, model: Any, parts: Parts) -> ModelFacts:
        tower = model.get_vision_tower()
        side, layers = tower.num_patches_per_side, len(parts.encoder_layers)
        keeps_cls = tower.select_feature == "cls_patch"
        tokens = side * side + int(keeps_cls)
        tiles, tiled = self.max_tiles(model), is_anyres(model.config)
        return ModelFacts(
            family=self.name,
            encoder_layers=layers,
            feature_layer=feature_layer(tower.select_layer, layers),
            grid=(side, side),
            tokens_per_tile=tokens,
            has_cls=True,
            cls_in_features=keeps_cls,
            max_tiles=tiles,
            tiled=tiled,
            max_visual_tokens=tiles * tokens + (side * (tiles - 1) if tiled else 0),
            decoder_layers=len(parts.decoder_layers),
        )

    def max_tiles(self, model: Any) -> int:
        if not is_anyres(model.config):
            return 1
        side = model.get_vision_tower().config.image_size
        pinpoints = model.config.image_grid_pinpoints
        if isinstance(pinpoints, str):
            pinpoints = ast.literal_eval(pinpoints)
        return 1 + max((width // side) * (height // side) for width, height in pinpoints)

    def layouts(
        self, parts: Parts, pixel_values: Any, image_sizes: Any, facts: ModelFacts,
        batch_num_images: Any = None,
    ) -> list[ImageLayout]:  # fmt: skip
        ids = torch.tensor([[0, PLACEHOLDER]] * len(pixel_values))
        return pack(parts.multimodal, facts, ids, None, pixel_values, image_sizes).layouts

    def newline(self, parts: Parts) -> Tensor | None:
        return getattr(parts.language_model, "image_newline", None)

    def entry(self, session: Session) -> Entry:
        from tokprune.integrations.llava_v1.entry import PrepareEntry

        return PrepareEntry(session)

    def tap(self, module: Any, function: TapFunction, wanted: Callable[[], bool]) -> Any:
        rotary = getattr(module, "rotary_emb", None)
        return ProjectionTap(module, function, wanted, rotary and RotaryTables(rotary))

    def window(self, parts: Parts, backend: str) -> int | None:
        # Mistral's sdpa masks in 4.37 leave the window out
        return None if backend == "sdpa" else super().window(parts, backend)
