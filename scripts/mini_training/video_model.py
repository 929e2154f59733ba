"""The embedded video model: mini's parts in transformers' LLaVA-NeXT-Video, and more words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlavaForConditionalGeneration,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from mini_training import model as mini_model
from mini_training.model import (
    IMAGE,
    TEMPLATE,
    VOCABULARY,
    build_config,
    build_processor,
    build_tokenizer,
    for_all_versions,
)
from mini_training.video_labels import POOL, TOKENS
from tokprune.eval.benchmarks.mini.world import PATCH, SIDE
from tokprune.eval.benchmarks.mini_video.clip import FRAMES, WORDS

#: mini's vocabulary first, so that its embeddings keep their numbers
VIDEO_VOCABULARY = tuple(dict.fromkeys([*VOCABULARY, "<video>", *WORDS]))
TOKEN = {token: number for number, token in enumerate(VIDEO_VOCABULARY)}
VIDEO = TOKEN["<video>"]
VISUAL = ("<image>", "<video>")
VIDEO_TEMPLATE = TEMPLATE.replace(
    "<image>\n{% else %}", "<image>\n{% elif part['type'] == 'video' %}<video>\n{% else %}"
)
MINI = Path(__file__).parents[2] / "tokprune" / "models" / "mini"


def encode(text: str) -> list[int]:
    """As mini's, with more words."""
    return mini_model.encode(text, TOKEN)


def build_video_config() -> LlavaNextVideoConfig:
    mini = build_config()
    mini.text_config.vocab_size = len(VIDEO_VOCABULARY)
    return LlavaNextVideoConfig(
        vision_config=mini.vision_config.to_dict(),
        text_config=mini.text_config.to_dict(),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        projector_hidden_act="gelu",
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_grid_pinpoints=[[SIDE, SIDE]],
        spatial_pool_mode="average",
        spatial_pool_stride=POOL,
        image_seq_length=4 * TOKENS,
        video_seq_length=FRAMES * TOKENS,
        tie_word_embeddings=True,
        pad_token_id=mini.pad_token_id,
        bos_token_id=mini.bos_token_id,
        eos_token_id=mini.eos_token_id,
    )


def build_video_model(seed: int = 0) -> Any:
    """Weights of mini; random embeddings for the words that it does not know."""
    torch.manual_seed(seed)
    model = LlavaNextVideoForConditionalGeneration(build_video_config())
    mini = LlavaForConditionalGeneration.from_pretrained(MINI, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        known = mini.get_input_embeddings().weight
        table.normal_(0, 0.1, generator=generator)[: len(known)] = known
        model.model.image_newline.normal_(0, 0.1, generator=generator)
    own, old = model.model, mini.model
    own.vision_tower.load_state_dict(old.vision_tower.state_dict())
    own.multi_modal_projector.load_state_dict(old.multi_modal_projector.state_dict())
    rest = {k: v for k, v in old.language_model.state_dict().items() if "embed" not in k}
    _, unknown = own.language_model.load_state_dict(rest, strict=False)
    assert not unknown
    return model


def build_video_tokenizer() -> PreTrainedTokenizerFast:
    """As mini's, with more words."""
    tokenizer = build_tokenizer(TOKEN, VISUAL)
    tokenizer.chat_template = VIDEO_TEMPLATE
    return tokenizer


def save_video(made: Any, folder: Path) -> None:
    """Weights in half precision, config, tokenizer and processor, under the names that transformers
    4.57 and 5.x know."""
    made.to(torch.float16).save_pretrained(folder)
    build_video_tokenizer().save_pretrained(folder)
    build_processor().image_processor.save_pretrained(folder)
    _save_processor(folder)
    for_all_versions(folder, VISUAL)


def _save_processor(folder: Path) -> None:
    """The files of transformers' own processor, which needs torchvision: here it cannot be made and
    saved."""
    path = folder / "preprocessor_config.json"
    pixels = json.loads(path.read_text())
    for name in ("image_processor_type", "processor_class"):
        pixels.pop(name, None)
    kind = "LlavaNextVideo"
    images = {
        **pixels, "do_pad": True, "image_grid_pinpoints": [[SIDE, SIDE]],
        "image_processor_type": "LlavaNextImageProcessor",
    }  # fmt: skip
    videos = {**pixels, "do_sample_frames": False, "video_processor_type": f"{kind}VideoProcessor"}
    processor = {
        "processor_class": f"{kind}Processor", "image_token": "<image>", "video_token": "<video>",
        "patch_size": PATCH, "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default", "image_processor": images,
        "video_processor": videos,
    }  # fmt: skip
    for name, content in (
        (path.name, images), ("video_preprocessor_config.json", videos),
        ("processor_config.json", processor),
    ):  # fmt: skip
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
