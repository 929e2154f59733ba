"""``tokprune.load(..., package="llava")``: the package's own loader, patched, safetensors only."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint import write_checkpoint
from llava.mm_utils import process_images, tokenizer_image_token
from PIL import Image
from transformers import LlavaConfig

import tokprune
from tokprune.integrations.llava_v1.loading import LlavaProcessor


@pytest.fixture(scope="module")
def checkpoint(original: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(original("anyres"), tmp_path_factory.mktemp("anyres"))


def test_loads_patches_and_answers(checkpoint: Path, original: Callable[..., Any]) -> None:
    model, processor = tokprune.load(
        checkpoint, "divprune", keep=12, package="llava", processor=True, dtype="float32",
        device_map="cpu",
    )  # fmt: skip
    assert tokprune.is_patched(model)
    assert isinstance(processor, LlavaProcessor)
    want = original("anyres").weights["model.layers.3.mlp.up_proj.weight"]
    assert torch.equal(model.model.layers[3].mlp.up_proj.weight, want.half().float())
    tokenizer, image_processor = processor
    picture = Image.new("RGB", (40, 14), (200, 30, 30))
    images = process_images([picture], image_processor, model.config)
    ids = tokenizer_image_token("USER: <image>\nis it red?", tokenizer, return_tensors="pt")
    with torch.no_grad():
        model(ids[None], images=images, image_sizes=[picture.size])
    trace = tokprune.trace_of(model)
    assert trace is not None
    assert trace.last is not None
    assert trace.last.images[0].record is not None
    assert trace.last.images[0].record.layout.tile_grid == (1, 2)
    assert trace.last.layers[-1].counts == [[12]]


def test_without_a_method(checkpoint: Path) -> None:
    model = tokprune.load(checkpoint, package="llava", device_map="cpu")
    assert not tokprune.is_patched(model)
    assert model.dtype == torch.float16


def test_the_class_is_that_of_the_config_not_of_the_folder(
    original: Callable[..., Any], tmp_path: Path
) -> None:
    path = write_checkpoint(original("anyres-mistral"), tmp_path)
    model = tokprune.load(path, "grid", keep=9, package="llava")
    assert type(model).__name__ == "LlavaMistralForCausalLM"


def test_a_setting_of_recommend(checkpoint: Path) -> None:
    setting = {"schema": 1, "method": "divprune", "options": {"keep": 9}}
    model = tokprune.load(checkpoint, package="llava", setting=setting)
    trace = tokprune.trace_of(model)
    assert trace is not None
    assert trace.method.startswith("DivPrune(keep=9")


def test_everything_is_checked_before_weights(checkpoint: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    for options, message in (
        ({"method": "flowcut", "keep": 100000}, "keep=100000"),
        ({"method": "flowcut", "kep": 9}, "Did you mean 'keep'"),
        ({"method": "flowcutt", "keep": 9}, "Did you mean 'flowcut'"),
        ({"keep": 9}, "method is None"),
        ({"method": "grid", "keep": 9, "dtype": "float12"}, "float12"),
        ({"method": "grid", "keep": 9, "model_base": "x"}, "model_base"),
        ({"method": "grid", "keep": 9, "use_safetensors": False}, "use_safetensors"),
        ({"method": "grid", "keep": 9, "attn_implementation": "flex"}, "flex"),
    ):
        with pytest.raises((ValueError, tokprune.UnsupportedModelError), match=message):
            tokprune.load(bare, package="llava", **options)
    with pytest.raises(OSError, match=r"bare holds no model\.safetensors"):
        tokprune.load(bare, "grid", keep=9, package="llava")


def test_pickled_weights_are_not_read(original: Callable[..., Any], tmp_path: Path) -> None:
    path = write_checkpoint(original("square"), tmp_path, safe=False)
    assert list((tmp_path / "clip").glob("*.bin"))
    with pytest.raises(OSError, match=r"clip holds no model\.safetensors"):
        tokprune.load(path, "grid", keep=9, package="llava")
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"model holds no model\.safetensors"):
        tokprune.load(path, "grid", keep=9, package="llava")


def test_other_checkpoints_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    LlavaConfig(architectures=["LlavaForConditionalGeneration"]).save_pretrained(tmp_path)
    with pytest.raises(tokprune.UnsupportedModelError, match="LlavaForConditionalGeneration"):
        tokprune.load(tmp_path, "grid", keep=9, package="llava")
    with pytest.raises(tokprune.UnsupportedModelError, match="LlavaForConditionalGeneration"):
        tokprune.load(tmp_path, "grid", keep=9)
    # LLaVA-1.5 checkpoints call their type 'llava', which transformers knows as another class
    old = json.loads((checkpoint / "config.json").read_text())
    old["model_type"] = "llava"
    (tmp_path / "config.json").write_text(json.dumps(old))
    with pytest.raises(tokprune.UnsupportedModelError, match="package='llava'"):
        tokprune.load(tmp_path, "grid", keep=9)
    with pytest.raises(ValueError, match="package='lava'"):
        tokprune.load(tmp_path, "grid", keep=9, package="lava")


@pytest.mark.filterwarnings("ignore:for .*no-op")
def test_towers_trained_with_the_model(original: Callable[..., Any], tmp_path: Path) -> None:
    """LLaVA-1.6: ``unfreeze_mm_vision_tower``, its weights are part of the checkpoint."""
    form = original("anyres")
    path = write_checkpoint(form, tmp_path, unfreeze_mm_vision_tower=True)
    model = tokprune.load(path, "flowcut", keep=9, package="llava", dtype="float32")
    name = "model.vision_tower.vision_tower.vision_model.encoder.layers.2.mlp.fc1.weight"
    assert torch.equal(model.state_dict()[name], form.weights[name].half().float())


def test_version_1_5_checkpoints_load(original: Callable[..., Any], tmp_path: Path) -> None:
    path = write_checkpoint(original("square"), tmp_path)
    config = json.loads((path / "config.json").read_text())
    config["model_type"] = "llava"
    (path / "config.json").write_text(json.dumps(config))
    model = tokprune.load(path, "grid", keep=9, package="llava")
    assert type(model).__name__ == "LlavaLlamaForCausalLM"
