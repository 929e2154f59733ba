"""Released shapes of newer families, as their config.json files have them, for random weights.

Where a number is the default of transformers' config class it is written out all the same; the
others are those of the public ``config.json`` of the checkpoint that ``source`` names. Rotary
scaling for long prompts is left out: it costs no time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tokprune.engine.compat import RELEASE


@dataclass(frozen=True)
class Released:
    """A model's sizes: ``text`` and ``vision`` as in the parts of its config, ``rest`` beside them.

    ``kind``: transformers' classes are ``{kind}Config`` and ``{kind}ForConditionalGeneration``;
    ``size``: (height, width) in pixels of the image that it is measured with; ``frames``: 0, or of
    the video.
    """

    kind: str
    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    rest: Mapping[str, Any]
    size: tuple[int, int]
    source: str
    #: rotary base; None: the default of transformers
    theta: float | None = None
    #: more of the rotation
    rotary: Mapping[str, Any] = field(default_factory=dict)
    frames: int = 0

    def changed(self, text: Mapping[str, Any], vision: Mapping[str, Any], **more: Any) -> Released:
        """The same model of other sizes."""
        text, vision = {**self.text, **text}, {**self.vision, **vision}
        return replace(self, text=text, vision=vision, **more)

    def config(self) -> Any:
        """transformers' config object."""
        import transformers

        made: Any = getattr(transformers, f"{self.kind}Config")
        text, rest = {**self.text, **self._rotation()}, {"tie_word_embeddings": False, **self.rest}
        return made(text_config=text, vision_config=dict(self.vision), **rest)

    def _rotation(self) -> dict[str, Any]:
        """Fields of the rotation, as this release of transformers names them."""
        if self.theta is None:
            return {}
        scaling = {"rope_type": "default", **self.rotary}
        if RELEASE >= (5, 0):
            return {"rope_parameters": {**scaling, "rope_theta": self.theta}}
        return {"rope_theta": self.theta, **({"rope_scaling": scaling} if self.rotary else {})}


#: Qwen2.5-7B, the decoder of Qwen2.5-VL-7B and InternVL3-8B
_QWEN25_7B = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
    "use_sliding_window": False,
}  # fmt: skip
_QWEN_TOKENS = {
    "image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}  # fmt: skip

_QWEN25_VL = Released(
    "Qwen2_5_VL",
    text={**_QWEN25_7B, "vocab_size": 152064, "max_position_embeddings": 128000},
    vision={
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
        "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
        "out_hidden_size": 3584, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
    },
    rest=_QWEN_TOKENS,
    size=(1008, 1008),  # 36 × 36 cells of 28 pixels: 1,296 tokens
    theta=1e6,
    rotary={"mrope_section": [16, 24, 24]},
    source="config.json of Qwen/Qwen2.5-VL-7B-Instruct, from memory",
)  # fmt: skip

RELEASED: dict[str, Released] = {
    "qwen2.5-vl-7b": _QWEN25_VL,
    # 64 × 64 cells: 4,096 tokens
    "qwen2.5-vl-7b-1792px": replace(_QWEN25_VL, size=(1792, 1792)),
    "qwen3-vl-8b": Released(
        "Qwen3VL",
        text={
            "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
            "vocab_size": 151936, "max_position_embeddings": 262144, "rms_norm_eps": 1e-6,
        },
        vision={
            "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16,
            "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
            "out_hidden_size": 4096, "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [8, 16, 24],
        },
        rest=_QWEN_TOKENS,
        size=(1024, 1024),  # 32 × 32 cells of 32 pixels: 1,024 tokens
        theta=5e6,
        rotary={"mrope_section": [24, 20, 20], "mrope_interleaved": True},
        source="config.json of Qwen/Qwen3-VL-8B-Instruct, from memory",
    ),
    "internvl3-8b": Released(
        "InternVL",
        text={
            **_QWEN25_7B, "model_type": "qwen2", "vocab_size": 151674,
            "max_position_embeddings": 32768,
        },
        vision={
            "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
            "num_attention_heads": 16, "attention_bias": True, "use_qk_norm": False,
            "image_size": [448, 448], "patch_size": [14, 14], "norm_type": "layer_norm",
        },
        rest={"image_token_id": 151667, "image_seq_length": 256, "downsample_ratio": 0.5},
        size=(1344, 1792),  # 3 × 4 tiles and a thumbnail of 256 tokens: 3,328 tokens
        theta=1e6,
        source="config.json of OpenGVLab/InternVL3-8B-hf, from memory",
    ),
    "gemma3-4b": Released(
        "Gemma3",
        text={
            "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
            "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
            "vocab_size": 262208, "max_position_embeddings": 131072, "sliding_window": 1024,
            "query_pre_attn_scalar": 256,
            "layer_types": ["full_attention" if n % 6 == 5 else "sliding_attention"
                            for n in range(34)],
        },
        vision={
            "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
            "num_attention_heads": 16, "image_size": 896, "patch_size": 14,
            "vision_use_head": False, "model_type": "siglip_vision_model",
        },
        rest={
            "mm_tokens_per_image": 256, "boi_token_index": 255999, "eoi_token_index": 256000,
            "image_token_index": 262144, "tie_word_embeddings": True,
        },
        size=(896, 896),  # 256 tokens, whatever the size
        source="config.json of google/gemma-3-4b-it, from memory",
    ),
}  # fmt: skip

#: the same checkpoints on a video of 64 frames, two a time: 32 × 16 × 32 = 16,384 tokens
VIDEOS: dict[str, Released] = {
    "qwen2.5-vl-7b-video": replace(_QWEN25_VL, size=(448, 896), frames=64),
    "qwen3-vl-8b-video": replace(RELEASED["qwen3-vl-8b"], size=(512, 1024), frames=64),
}
