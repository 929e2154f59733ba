"""The family of the original ``llava`` package's models."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokprune.engine.compat import LEGACY
from tokprune.engine.family import Family
from tokprune.engine.model import Block, ImageLayout, ModelFacts, Parts, Tower
from tokprune.engine.tap import Call, TapFunction
from tokprune.errors import UnsupportedModelError
from tokprune.families.base import decoder_blocks, encoder_layers_of, llava_facts, tower_facts
from tokprune.integrations.llava_v1.attention import ProjectionTap, attention_call, window_of
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
    pixels = "images"
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
        return Parts(
            multimodal=model,
            language_model=decoder,
            decoder_layers=[
                replace(block, window=window_of(block.attention))
                for block in decoder_blocks(decoder)
            ],
            image_token_id=PLACEHOLDER,
            encoder=clip,
            tower=Tower(clip, encoder_layers_of(clip), decoder.mm_projector),
        )

    def facts(self, model: Any, parts: Parts) -> ModelFacts:
        assert parts.tower is not None
        wrapper = model.get_vision_tower()
        tower = tower_facts(
            parts.tower, wrapper.config, wrapper.select_layer,
            keeps_cls=wrapper.select_feature == "cls_patch", max_tiles=self.max_tiles(model),
            tiled=is_anyres(model.config),
        )  # fmt: skip
        return llava_facts(self.name, parts, tower)

    def max_tiles(self, model: Any) -> int:
        if not is_anyres(model.config):
            return 1
        side = model.get_vision_tower().config.image_size
        pinpoints = model.config.image_grid_pinpoints
        if isinstance(pinpoints, str):
            pinpoints = ast.literal_eval(pinpoints)
        return 1 + max((width // side) * (height // side) for width, height in pinpoints)

    def images(self, parts: Parts, facts: ModelFacts, call: Mapping[str, Any]) -> list[ImageLayout]:
        assert facts.tower is not None
        images, sizes = call["images"], call.get("image_sizes")
        ids = torch.tensor([[0, PLACEHOLDER]] * len(images))
        return pack(parts.multimodal, facts.tower, ids, None, images, sizes).layouts

    def newline(self, parts: Parts) -> Tensor | None:
        return getattr(parts.language_model, "image_newline", None)

    def entry(self, session: Session) -> Entry:
        from tokprune.integrations.llava_v1.entry import PrepareEntry

        return PrepareEntry(session)

    def tap(self, module: Any, function: TapFunction, wanted: Callable[[], bool]) -> Any:
        return ProjectionTap(module, function, wanted)

    def attention_ahead(self, block: Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        module = block.attention
        with torch.no_grad():
            x = block.module.input_layernorm(args[0] if args else kwargs["hidden_states"])
            return attention_call(
                module, module.q_proj(x), module.k_proj(x), module.v_proj(x), kwargs
            )
