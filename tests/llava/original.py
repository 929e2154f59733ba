"""Tiny models of the original package with the weights of the reference, and their inputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from llava.model import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.language_model.llava_mistral import LlavaMistralConfig, LlavaMistralForCausalLM
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from tokprune.testing.oracle import continuation_tokens, mask_decoder, mask_tower

PLACEHOLDER = -200
CLASSES = {
    "llama": (LlavaConfig, LlavaLlamaForCausalLM),
    "mistral": (LlavaMistralConfig, LlavaMistralForCausalLM),
}


class Original:
    """A model of the reference in its original form, and the reference's inputs for it."""

    def __init__(self, reference: Path, folder: Path, attention: str) -> None:
        self.known = json.loads((reference / "config.json").read_text())
        self.weights = load_file(reference / "model.safetensors")
        self.cases = load_file(reference / "cases.safetensors")
        self.tower = write_tower(folder / "tower", self.known["vision"])
        self.model = self.build(attention)

    def config(self, **changes: Any) -> Any:
        pinpoints, vision = self.known["pinpoints"], self.known["vision"]
        anyres = {
            "mm_patch_merge_type": "spatial_unpad",
            "image_aspect_ratio": "anyres",
            # (width, height) here, (height, width) in transformers
            "image_grid_pinpoints": pinpoints and [[w, h] for h, w in pinpoints],
        }
        options = {
            **self.known["text"],
            **({"sliding_window": None} if self.known["decoder"] == "mistral" else {}),
            **(anyres if pinpoints else {}),
            "pad_token_id": 0,
            "eos_token_id": 1000,  # none of the vocabulary: answers have the length asked for
            "mm_vision_tower": str(self.tower),
            "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "patch",
            "mm_projector_type": "mlp2x_gelu",
            "mm_hidden_size": vision["hidden_size"],
            "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False,
            "use_mm_proj": True,
            "tokenizer_padding_side": "left",
        }
        return CLASSES[self.known["decoder"]][0](**{**options, **changes})

    def build(self, attention: str = "sdpa", **changes: Any) -> Any:
        config = self.config(**changes)
        config._attn_implementation = attention
        model = CLASSES[self.known["decoder"]][1](config)
        tower = model.get_vision_tower()
        tower.vision_tower = CLIPVisionModel(CLIPVisionConfig.from_pretrained(self.tower))
        tower.is_loaded = True
        missing, extra = model.load_state_dict(self.weights, strict=False)
        assert not missing
        assert set(extra) <= {"model.image_newline"}
        return model.eval()

    def inputs(self, prompt: str) -> dict[str, Any]:
        """The reference's prompt with one placeholder per image, padding at the left."""
        given = {
            key.split("/")[-1]: value
            for key, value in self.cases.items()
            if key.startswith(f"{prompt}/inputs/")
        }
        rows = []
        for ids, mask in zip(given["input_ids"], given["attention_mask"]):
            row, own = [], ids[mask != 0].tolist()
            starts = self._image_starts(prompt, len(rows))
            for at, token in enumerate(own):
                if token != self.known["image_token"]:
                    row.append(token)
                elif at in starts:
                    row.append(PLACEHOLDER)
            rows.append(row)
        longest = max(map(len, rows))
        inputs: dict[str, Any] = {
            "input_ids": torch.tensor([[0] * (longest - len(r)) + r for r in rows]),
            "attention_mask": torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows]),
        }
        pixels = given["pixel_values"]
        if "image_sizes" in given:
            sizes = [(w, h) for h, w in given["image_sizes"].tolist()]
            tiles = [int((p.abs().amax((1, 2, 3)) > 0).sum()) for p in pixels]
            inputs["images"] = [p[:n] for p, n in zip(pixels, tiles)]
            inputs["image_sizes"] = sizes
        else:
            inputs["images"] = pixels
        return inputs

    def _image_starts(self, prompt: str, row: int) -> set[int]:
        """Places (padding left out) at which an image of the reference's prompt begins: images
        never touch there, so every run of placeholders is one."""
        ids = self.cases[f"{prompt}/inputs/input_ids"][row]
        own = ids[self.cases[f"{prompt}/inputs/attention_mask"][row] != 0]
        image = own == self.known["image_token"]
        before = torch.nn.functional.pad(image, (1, 0))[:-1]
        return set((image & ~before).nonzero().view(-1).tolist())


def write_tower(folder: Path, vision: dict[str, Any]) -> Path:
    """A CLIP tower's config and image processor, as ``mm_vision_tower`` names them."""
    CLIPVisionConfig(**vision).save_pretrained(folder)
    side = vision["image_size"]
    CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    ).save_pretrained(folder)
    return folder


def any_positions(inputs: dict[str, Any]) -> Tensor:
    """Makes the package number every row from its first real token on, as ``generate`` does."""
    return torch.zeros_like(inputs["input_ids"])


@torch.no_grad()
def compressed_logits(model: Any, inputs: dict[str, Any], continuation: Tensor) -> Tensor:
    """Logits [B, 1 + steps, V]: one prefill, then cached steps fed with ``continuation``."""
    out = model(**inputs, position_ids=any_positions(inputs), use_cache=True)
    rows, cache = [out.logits[:, -1]], out.past_key_values
    mask = expanded_mask(model, inputs)
    for step in range(continuation.shape[1]):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        out = model(
            input_ids=continuation[:, step : step + 1], attention_mask=mask,
            past_key_values=cache, position_ids=mask.cumsum(1)[:, -1:] - 1, use_cache=True,
        )  # fmt: skip
        rows.append(out.logits[:, -1])
    return torch.stack(rows, dim=1)


def expanded_mask(model: Any, inputs: dict[str, Any]) -> Tensor:
    """The mask [B, L] after the package packed its images."""
    return type(model).prepare_inputs_labels_for_multimodal(
        model, inputs["input_ids"], None, inputs["attention_mask"], None, None, inputs["images"],
        inputs.get("image_sizes"),
    )[2]  # fmt: skip


def answer(model: Any, inputs: dict[str, Any], tokens: int, **options: Any) -> Tensor:
    """Greedy answers [B, tokens] (``options`` change how); generate() of 4.37 puts a token for the
    beginning in front where the prompt came as embeddings."""
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    options = {"max_new_tokens": tokens, "do_sample": False, "use_cache": True, **options}
    return model.generate(inputs["input_ids"], **rest, **options)[:, 1:]  # type: ignore[no-any-return]


@torch.no_grad()
def oracle_logits(
    model: Any, inputs: dict[str, Any], trace: Any, continuation: Tensor, window: int | None = None
) -> Tensor:
    """The same logits of the unpruned model with the dropped keys hidden, layer by layer."""
    prompt = expanded_mask(model, inputs)
    length, steps = prompt.shape[1], continuation.shape[1]
    longer = {
        **inputs,
        "input_ids": torch.cat([inputs["input_ids"], continuation], dim=1),
        "attention_mask": torch.cat(
            [inputs["attention_mask"], torch.ones_like(continuation)], dim=1
        ),
    }
    handles = mask_tower(model, trace) + mask_decoder(model, trace, length, steps, window)
    try:
        logits = model(**longer, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return logits[:, length - 1 :]  # type: ignore[no-any-return]


__all__ = [
    "CLASSES", "PLACEHOLDER", "Original", "answer", "compressed_logits", "continuation_tokens",
    "expanded_mask", "oracle_logits", "write_tower",
]  # fmt: skip
