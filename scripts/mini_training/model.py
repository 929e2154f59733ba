"""The embedded model's shape, tokenizer and processor."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordPiece
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from tokprune.eval.benchmarks.mini.world import CHARACTERS, PATCH, SIDE, WORDS

PAD, BOS, EOS, UNK, IMAGE = range(5)
ROPE_BASE = 1e6
_TOWER = "vision_tower.vision_model."
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
#: a character at the start of a word, and inside one
VOCABULARY = tuple(dict.fromkeys([*SPECIAL, *WORDS, *CHARACTERS, *(f"##{c}" for c in CHARACTERS)]))
TOKEN = {token: number for number, token in enumerate(VOCABULARY)}
TEMPLATE = (
    "{% for message in messages %}"
    "{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def encode(text: str, token: Mapping[str, int] = TOKEN) -> list[int]:
    """Token ids of lower-case words with spaces between them, as the tokenizer gives them."""
    ids = []
    for word in text.split():
        if word in token:
            ids.append(token[word])
        else:
            ids += [token[word[0]], *(token[f"##{c}"] for c in word[1:])]
    return ids


def build_tokenizer(
    token: Mapping[str, int] = TOKEN, visual: Sequence[str] = ("<image>",)
) -> PreTrainedTokenizerFast:
    """Words of the benchmark as they are, anything else letter by letter; ``visual``: the
    placeholders among them."""
    pieces = Tokenizer(WordPiece(dict(token), unk_token="<unk>", continuing_subword_prefix="##"))
    pieces.normalizer = normalizers.Lowercase()
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    from tokenizers.processors import TemplateProcessing

    pieces.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=list(visual),
        padding_side="left",
        model_max_length=2048,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def build_processor() -> LlavaProcessor:
    images = CLIPImageProcessor(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.25, 0.25, 0.25],
    )
    return LlavaProcessor(
        images,
        build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=TEMPLATE,
    )


def build_config() -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=128,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=2048,
        rope_theta=ROPE_BASE,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        image_token_index=IMAGE,
        projector_hidden_act="gelu",
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=(SIDE // PATCH) ** 2,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def build_model(seed: int = 0) -> Any:
    """Fresh weights: linear maps 1/√fan-in, those that write to the residual stream smaller."""
    torch.manual_seed(seed)
    config = build_config()
    model = LlavaForConditionalGeneration(config)
    depth = {"vision": config.vision_config.num_hidden_layers,
             "text": config.text_config.num_hidden_layers}  # fmt: skip
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                if "norm" not in name and "class_embedding" not in name:
                    weight.zero_()
            elif "embed" in name:
                weight.normal_(0, 0.1)
            else:
                weight.normal_(0, weight.flatten(1).shape[1] ** -0.5)
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    weight.mul_((2 * depth["text"]) ** -0.5)
                if name.endswith(("out_proj.weight", "fc2.weight")):
                    weight.mul_((2 * depth["vision"]) ** -0.5)
        # never trained, so in no checkpoint: the same whatever transformers has drawn before
        table = model.get_input_embeddings().weight
        table.normal_(0, 0.1, generator=torch.Generator().manual_seed(seed))
        for layer in model.model.language_model.layers:
            # heads start by looking for what resembles the query, and by copying what they find
            attention = layer.self_attn
            attention.k_proj.weight.copy_(attention.q_proj.weight)
            attention.o_proj.weight.copy_(attention.v_proj.weight.T * (2 * depth["text"]) ** -0.5)
    return model


def save(model: Any, folder: Path) -> None:
    """Everything that ``from_pretrained`` wants, under transformers 4.57 and 5.x: weights in half
    precision, config, processor."""
    model.to(torch.float16).save_pretrained(folder)
    processor = build_processor()
    processor.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)  # 5.x puts it into the processor's file
    edit(
        folder / "preprocessor_config.json",
        lambda c: c.update(image_processor_type="CLIPImageProcessor"),
    )
    for_all_versions(folder, ["<image>"])


def for_all_versions(folder: Path, visual: Sequence[str]) -> None:
    """Give weights, config and tokenizer of a saved model the names and places that both ends of
    the supported range know; ``visual``: its placeholders."""
    weights = {
        name if "vision_model." in name else name.replace("vision_tower.", _TOWER): value
        for name, value in load_file(folder / "model.safetensors").items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    edit(folder / "config.json", lambda c: c["text_config"].update(rope_theta=ROPE_BASE))
    edit(
        folder / "tokenizer_config.json",
        lambda c: c.update(
            tokenizer_class="PreTrainedTokenizerFast",
            extra_special_tokens={},
            additional_special_tokens=list(visual),
        ),
    )


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a JSON file."""
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
