"""The processor of models that take videos, with and without torchvision."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_processor
import torch
from PIL import Image

import tokprune
from tokprune.inputs.frames_processor import FramesProcessor
from tokprune.inputs.prompts import encode, prompt_text

HAS_TORCHVISION = importlib.util.find_spec("torchvision") is not None
without = pytest.mark.skipif(HAS_TORCHVISION, reason="torchvision is installed")
FRAMES = 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Path]:
    root = tmp_path_factory.mktemp("processors")
    return {
        (family, old): tiny_processor.save_video(root / f"{family}-{old}", family, old)
        for family in tiny.VIDEO_BUILDERS
        for old in (False, True)
    }


@pytest.fixture(scope="module")
def clips() -> list[list[Image.Image]]:
    """Two clips of frames that fit the tower as they are."""
    generator = torch.Generator().manual_seed(3)
    size = (2, FRAMES, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, 3)
    values = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
    return [[Image.fromarray(frame.numpy()) for frame in clip] for clip in values]


def frames_processor(folder: Path) -> tuple[Any, FramesProcessor]:
    model = tokprune.load(folder)
    return model, FramesProcessor.load(folder, model, {})


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("family", tiny.VIDEO_BUILDERS)
def test_frames_become_pixels_and_placeholders(
    folders: Any, clips: Any, family: str, old: bool
) -> None:
    model, processor = frames_processor(folders[family, old])
    processor.tokenizer.padding_side = "left"
    inputs = encode(
        processor, ["what is in the lake ?", "what ?"], clips, torch.device("cpu"), "video"
    )
    pixels = inputs["pixel_values_videos"]
    assert pixels.shape == (2, FRAMES, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    import numpy as np

    raw = torch.tensor(np.stack([np.asarray(f) for f in clips[1]])).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(v)[None, :, None, None] for v in ([0.5, 0.4, 0.6], [0.25, 0.2, 0.3]))
    torch.testing.assert_close(pixels[1], (raw - mean) / std, atol=1e-5, rtol=0)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    tokens = tiny.video_tokens_of(model, FRAMES)
    assert (ids == tiny.VIDEO_TOKEN).sum(1).tolist() == [tokens, tokens]
    assert mask[:, -1].tolist() == [1, 1]  # padded at the left
    assert mask[1].sum() == mask[0].sum() - 4
    with torch.inference_mode():
        assert model(**inputs).logits.shape[:2] == ids.shape


@without
@pytest.mark.parametrize("family", tiny.VIDEO_BUILDERS)
def test_loading_does_without_torchvision(folders: Any, clips: Any, family: str) -> None:
    _, processor = tokprune.load(folders[family, False], processor=True)
    assert isinstance(processor, FramesProcessor)
    with pytest.raises(ImportError, match=r"images .* need torchvision"):
        processor(images=[clips[0][0]], text=["<image> what ?"])


@pytest.mark.skipif(not HAS_TORCHVISION, reason="transformers' video processors need torchvision")
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("family", tiny.VIDEO_BUILDERS)
def test_the_same_as_transformers_own(folders: Any, clips: Any, family: str, old: bool) -> None:
    model, theirs = tokprune.load(folders[family, old], processor=True)
    assert not isinstance(theirs, FramesProcessor)
    _, ours = frames_processor(folders[family, old])
    questions = ["what is in the lake ?", "what ?"]
    for processor in (ours, theirs):
        processor.tokenizer.padding_side = "left"
    made = [encode(p, questions, clips, model.device, "video") for p in (ours, theirs)]
    assert set(made[0]) == set(made[1])
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(made[0][name], made[1][name])
    pixels = [m["pixel_values_videos"] for m in made]
    torch.testing.assert_close(*pixels, atol=1e-4, rtol=0)
    larger = [[frame.resize((50, 40)) for frame in clip] for clip in clips]
    pixels = [
        encode(p, questions, larger, model.device, "video")["pixel_values_videos"]
        for p in (ours, theirs)
    ]
    assert pixels[0].shape == pixels[1].shape
    # rounding to whole grey levels before the normalisation
    assert (pixels[0] - pixels[1]).abs().max() < 2.5 / 255 / 0.2


def test_prompts_of_a_template_and_without(folders: Any) -> None:
    _, processor = frames_processor(folders["llava_next_video", True])
    text = prompt_text(processor, "what ?", images=0, videos=1)
    assert text == "user : <video>\nwhat ? assistant :"
    processor.chat_template = None
    assert prompt_text(processor, "what ?", images=0, videos=1) == (
        "USER: <video>\nwhat ? ASSISTANT:"
    )


def test_bad_videos_are_refused(folders: Any, clips: Any) -> None:
    _, processor = frames_processor(folders["llava_next_video", False])
    with pytest.raises(ValueError, match=r"videos of \[3, 4\] frames in one batch"):
        processor(videos=[clips[0], clips[1][:3]], text=["<video> a", "<video> a"])
    with pytest.raises(ValueError, match=r"videos: 1 for prompts with 2 places \(<video>\)"):
        processor(videos=[clips[0]], text=["<video> a", "<video> a"])
    with pytest.raises(ValueError, match="should be a list of a video's frames"):
        processor(videos=clips[0], text="<video> a")
    with pytest.raises(ValueError, match="return_tensors='np' should be 'pt'"):
        processor(text="a", return_tensors="np")
    plain = processor(text="what is a house ?")
    assert "pixel_values_videos" not in plain
    assert processor.batch_decode(plain["input_ids"]) == ["what is a house ?"]
    assert processor.decode(plain["input_ids"][0]) == "what is a house ?"
