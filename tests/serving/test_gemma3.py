"""Gemma 3: images whose tokens see each other both ways."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import both_ways
import pytest
from block_models import make
from serving_case import (
    ask,
    assert_alike,
    assert_as_in_transformers,
    engine,
    furthest,
    generate,
    loaded,
    questions,
    two_images,
)

import tokprune

ARCHITECTURE = "TokpruneGemma3ForConditionalGeneration"
PROMPT = "w6 w7 <start_of_image> {}"
DIVPRUNE = json.dumps({"method": "divprune", "options": {"keep": 6}, "max_keep": 9})
OPTIONS = {"limit_mm_per_prompt": {"image": 2}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make("gemma3", tmp_path_factory.mktemp("gemma3") / "model"))


@pytest.fixture(scope="module")
def seeing() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        both_ways.install(patch)
        yield


ASKED = [
    (" ".join(f"w{3 + n + m}" for m in range(4 * n)), str(n), questions()[4 * n][2].resize(size))
    for n, size in enumerate([(32, 32), (40, 100), (90, 50)], 1)
]


def test_refused_where_images_are_seen_one_way(folder: str) -> None:
    """Before the others, which let them be seen both ways."""
    with pytest.raises(Exception, match="CPU_ATTN lets a token of an image see only"):
        engine(DIVPRUNE, folder, ARCHITECTURE, **OPTIONS)


@pytest.mark.parametrize(
    ("served", "setting"),
    [
        (DIVPRUNE, {"method": "divprune", "keep": 6}),
        (None, {"method": "pool", "keep": 4}),
        (None, {"method": "grid", "keep": 0.5}),
        ('{"method": "none"}', {}),
    ],
    ids=["divprune", "pool", "grid", "none"],
)
def test_as_in_transformers(
    served: Any, setting: Any, seeing: None, folder: str, engines: Any
) -> None:
    text = json.dumps(setting)
    llm = engines(served or text, folder, ARCHITECTURE, **OPTIONS)
    assert_as_in_transformers(llm, folder, text, PROMPT, ASKED)


def test_several_images(seeing: None, folder: str, engines: Any) -> None:
    whole = engines(DIVPRUNE, folder, ARCHITECTURE, **OPTIONS)
    # one request at a time: vLLM cuts an image that is next and longer than what is left of a step
    short = engines(DIVPRUNE, folder, ARCHITECTURE, enable_prefix_caching=False, max_num_seqs=1,
                    max_num_batched_tokens=24, disable_chunked_mm_input=True, max_model_len=512,
                    **OPTIONS)  # fmt: skip
    images = [image for _, _, image in ASKED]
    requests = two_images(PROMPT, images, 3, 1, 9)
    assert_alike(short, [whole, whole, short], requests)


def test_crops_are_images_of_their_own(seeing: None, folder: str, engines: Any) -> None:
    """Pan-and-scan: text stands between the image and its crops."""
    how = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 16,
           "pan_and_scan_max_num_crops": 2, "pan_and_scan_min_ratio_to_activate": 1.2}  # fmt: skip
    llm = engines(DIVPRUNE, folder, ARCHITECTURE, **OPTIONS)
    model, processor = loaded(folder)
    image, text = ASKED[1][2], PROMPT.format("w7 w8")
    own = {"prompt": text, "multi_modal_data": {"image": image}, "mm_processor_kwargs": how}
    (got,) = ask(llm, [own])
    inputs = processor(images=image, text=text, return_tensors="pt", **how)
    with tokprune.compress(model, "divprune", keep=6):
        want = generate(model, processor, inputs)
    assert got.prompt == want.prompt - 3 * (16 - 6)
    assert got.text == want.text
    assert furthest(got, want) < 1e-4
