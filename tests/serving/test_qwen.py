"""Qwen2-VL and Qwen2.5-VL: images of any size, at their original positions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from qwen_model import CELL, CLASSES, make
from serving_case import Answer, ask, ask_questions, furthest, in_transformers, model_of, prompting

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
]


@pytest.mark.parametrize(("kind", "setting"), CASES, ids=map(json.dumps, CASES))
def test_as_in_transformers(kind: str, setting: Any, folders: Any, engines: Any) -> None:
    text, folder = json.dumps(setting), folders[kind]
    llm = engines(text, folder, f"Tokprune{CLASSES[kind]}", **OPTIONS)
    with prompting(PROMPT):
        reference = text if setting["method"] != "none" else "{}"
        want = in_transformers(folder, reference, [(q, image) for q, _, image in ASKED])
        got = ask_questions(llm, ASKED)
        compare(got, want)
        if setting["method"] == "divprune":
            assert [own.kept for own in got] == [own.kept for own in want]
        compare(ask_questions(llm, ASKED), want)  # from the prefix cache


def test_chunks_and_several_images(folder: str, engines: Any) -> None:
    setting = {"method": "divprune", "options": {"keep": 12}, "max_keep": 20}
    text = json.dumps(setting)
    whole = engines(text, folder, ARCHITECTURE, enable_prefix_caching=False, **OPTIONS)
    short = engines(text, folder, ARCHITECTURE, max_num_batched_tokens=32, max_model_len=512,
                    **OPTIONS)  # fmt: skip
    images = [image for _, _, image in ASKED]
    requests: list[dict[str, Any]] = [
        {"prompt": PROMPT.format("w7 w8") + " " + PROMPT.format("w9"),
         "multi_modal_data": {"image": [images[n], images[(n + 2) % 6]]}}
        for n in range(4)
    ]  # fmt: skip
    requests[1]["mm_processor_kwargs"] = {"tokprune": {"keep": 20}}
    alone = [own for each in requests for own in ask(whole, [each])]
    for llm in (whole, short, short):
        for got, want in zip(ask(llm, requests), alone, strict=True):
            assert (got.text, got.prompt) == (want.text, want.prompt)
            assert furthest(got, want) < 1e-4


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
