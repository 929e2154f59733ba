"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images of any size, at their original positions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from qwen_model import CELL, CLASSES, make
from serving_case import (
    Answer,
    ask,
    ask_questions,
    assert_alike,
    furthest,
    generate,
    in_transformers,
    loaded,
    model_of,
    not_numbers,
    prompting,
    two_images,
)
from vllm.distributed import parallel_state

from tokprune.integrations.vllm.mrope import placed, prompt_positions, with_places

KIND = "qwen2.5-vl"
ARCHITECTURE = f"Tokprune{CLASSES[KIND]}"
#: (height, width) in tokens: square, wide, tall
SHAPES = ((6, 6), (3, 11), (11, 3), (4, 5), (2, 16), (16, 2))
PROMPT = "<|vision_start|><|image_pad|><|vision_end|> {}"
OPTIONS = {"limit_mm_per_prompt": {"image": 2, "video": 0}}


def picture(height: int, width: int, seed: int) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(height, width, 3, generator=generator).mul(255).byte().numpy()
    size = (width * CELL, height * CELL)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


ASKED = [
    (f"w{3 + n} w{9 + n} w{5 + 2 * n}", str(n), picture(h, w, n)) for n, (h, w) in enumerate(SHAPES)
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = Path(tmp_path_factory.mktemp("qwen"))
    return {kind: str(make(kind, root / kind)) for kind in CLASSES}


@pytest.fixture(scope="module")
def folder(folders: dict[str, str]) -> str:
    return folders[KIND]


def compare(got: list[Answer], want: list[Answer]) -> None:
    assert [own.prompt for own in got] == [own.prompt for own in want]
    assert max(furthest(a, b) for a, b in zip(got, want)) < 1e-4
    assert [own.text for own in got] == [own.text for own in want]


DIVPRUNE = {"method": "divprune", "keep": 12}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("qwen2.5-vl", DIVPRUNE),
    ("qwen2.5-vl", {"method": "divprune", "keep": 0.3, "order": "published"}),
    ("qwen2.5-vl", {"method": "pool", "window": 2}),
    ("qwen2.5-vl", {"method": "none"}),
    ("qwen2-vl", DIVPRUNE),
    ("qwen3-vl", DIVPRUNE),
    ("qwen3-vl", {"method": "divprune", "keep": 0.3, "order": "published"}),
    ("qwen3-vl", {"method": "pool", "window": 2}),
    ("qwen3-vl", {"method": "none"}),
    ("qwen3-vl-moe", DIVPRUNE),
]


@pytest.mark.parametrize(("kind", "setting"), CASES, ids=map(json.dumps, CASES))
def test_as_in_transformers(kind: str, setting: Any, folders: Any, engines: Any) -> None:
    text, folder = json.dumps(setting), folders[kind]
    if kind == "qwen3-vl-moe" and parallel_state._EP is None:
        # a process makes it for its first engine, where that has experts
        parallel_state._EP = parallel_state._TP
    llm = engines(text, folder, f"Tokprune{CLASSES[kind]}", **OPTIONS)
    with prompting(PROMPT):
        reference = text if setting["method"] != "none" else "{}"
        want = in_transformers(folder, reference, [(q, image) for q, _, image in ASKED])
        got = ask_questions(llm, ASKED)
        compare(got, want)
        if setting["method"] == "divprune":
            assert [own.kept for own in got] == [own.kept for own in want]
        compare(ask_questions(llm, ASKED), want)  # from the prefix cache


def test_features_that_are_no_numbers(folders: Any, engines: Any) -> None:
    llm = engines(json.dumps(DIVPRUNE), folders["qwen3-vl"], f"Tokprune{CLASSES['qwen3-vl']}",
                  max_num_seqs=2, **OPTIONS)  # fmt: skip
    asked = [("w3 w9", "nan", picture(6, 6, 99))]
    with prompting(PROMPT), not_numbers(model_of(llm), "visual"):
        (got,) = ask_questions(llm, asked)
    assert got.kept == [0] * 12


@pytest.mark.parametrize("kind", [KIND, "qwen3-vl"])
def test_chunks_and_several_images(kind: str, folders: Any, engines: Any) -> None:
    setting = {"method": "divprune", "options": {"keep": 12}, "max_keep": 20}
    own = (json.dumps(setting), folders[kind], f"Tokprune{CLASSES[kind]}")
    whole = engines(*own, enable_prefix_caching=False, **OPTIONS)
    short = engines(*own, max_num_batched_tokens=32, max_model_len=512, **OPTIONS)
    images = [image for _, _, image in ASKED]
    requests = two_images(PROMPT, images, 4, 2, 20)
    assert_alike(whole, [whole, short, short], requests)


VIDEO = PROMPT.replace("image", "video")


def video_request(images: list[Image.Image], video: Any, keep: Any = None) -> dict[str, Any]:
    """Images, and a video behind them."""
    data: dict[str, Any] = {"image": images, "video": video} if images else {"video": video}
    own: dict[str, Any] = {"prompt": video_prompt(len(images)), "multi_modal_data": data}
    if keep is not None:
        own["mm_processor_kwargs"] = {"tokprune": {"keep": keep}}
    return own


def video_prompt(images: int) -> str:
    return PROMPT.format("w5 ") * images + VIDEO.format("w7 w8")


@pytest.mark.parametrize("kind", [KIND, "qwen3-vl"])
def test_videos_keep_their_tokens(kind: str, folders: Any, engines: Any) -> None:
    """Alone, and behind an image that is reduced, or keeps all of its tokens in the same way."""
    frames = torch.stack([torch.from_numpy(np.array(picture(5, 4, n))) for n in range(6)]).numpy()
    # two frames a second, as Qwen2.5-VL assumes: with other rates vLLM counts time otherwise
    told = {"fps": 2.0, "duration": 3.0, "total_num_frames": 6, "frames_indices": list(range(6)),
            "video_backend": "opencv"}  # fmt: skip
    setting = {"method": "divprune", "options": {"keep": 12}, "max_keep": 1.0}
    llm = engines(json.dumps(setting), folders[kind], f"Tokprune{CLASSES[kind]}",
                  limit_mm_per_prompt={"image": 1, "video": 1})  # fmt: skip
    image = [ASKED[1][2]]
    video = (frames, {**told, "do_sample_frames": False})
    requests = [
        video_request([], video), video_request(image, video, 1.0), video_request(image, video)
    ]  # fmt: skip
    alone, whole, short = ask(llm, requests)
    assert short.prompt == whole.prompt - 33 + 12
    for got, images in ((alone, []), (whole, image)):
        (want,) = generated(folders[kind], images, frames, told)
        compare([got], [want])
    compare(ask(llm, requests), [alone, whole, short])  # from the prefix cache


def generated(folder: str, images: list[Image.Image], frames: Any, told: Any) -> list[Answer]:
    """The answer of transformers, unpruned."""
    model, processor = loaded(folder)
    inputs = processor(
        images=images or None, videos=[frames], text=video_prompt(len(images)),
        video_metadata=[told], do_sample_frames=False, return_tensors="pt",
    )  # fmt: skip
    return [generate(model, processor, inputs)]


def test_encoder_runs_few_images_at_a_time(folder: str, engines: Any) -> None:
    llm = engines('{"method": "divprune", "keep": 2}', folder, ARCHITECTURE,
                  enable_prefix_caching=False, **OPTIONS)  # fmt: skip
    model, runs = model_of(llm), []
    model.at_once = 60
    handle = model.visual.register_forward_pre_hook(
        lambda module, args, kwargs: runs.append(len(kwargs["grid_thw"])), with_kwargs=True
    )
    with prompting(PROMPT):
        ask_questions(llm, ASKED)
        ask(llm, [{"prompt": PROMPT.format("w4"), "multi_modal_data": {"image": picture(6, 6, n)}}
                  for n in range(50, 54)])  # fmt: skip
    handle.remove()
    assert max(runs) == 1


def test_positions() -> None:
    media = [(2, 3, True, (1, 2, 5), 1.0)]
    positions, delta = prompt_positions(8, media)
    assert positions[0].tolist() == [0, 1, 2, 2, 2, 7, 8, 9]
    assert delta == 2
    cell = torch.tensor([1, 4, 8])
    features = with_places(torch.zeros(3, 4), cell, 5)
    is_media = torch.tensor([0, 0, 1, 1, 1, 0, 0, 0]).bool()
    for computed, part in ((0, features), (2, features), (2, features[:2])):
        clean, new, after = placed(positions, is_media, computed, [part])
        assert [own.shape[1] for own in clean] == [4]
        assert after == delta
        assert new[:, 2].tolist() == [2, 2, 3]
        assert new[:, 3].tolist() == [2, 2, 6]
        assert new[:, 4].tolist() == ([2, 3, 5] if len(part) == 3 else [2, 2, 2])
        assert torch.equal(placed(new, is_media, computed, [part])[1], new)
