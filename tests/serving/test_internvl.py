"""InternVL: tiles in one run between two tokens."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from block_models import make
from serving_case import (
    ask,
    assert_alike,
    assert_as_in_transformers,
    furthest,
    generate,
    loaded,
    questions,
    two_images,
)

ARCHITECTURE = "TokpruneInternVLForConditionalGeneration"
PROMPT = "<IMG_CONTEXT>\n {}"
#: (height, width) in pixels, and tiles of 9 tokens that they are cut into
SIZES = {(24, 24): 1, (24, 48): 3, (72, 24): 4, (50, 50): 5, (30, 90): 4}
DIVPRUNE = json.dumps({"method": "divprune", "options": {"keep": 20}, "max_keep": 30})
OPTIONS = {"limit_mm_per_prompt": {"image": 2, "video": 1}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make("internvl", tmp_path_factory.mktemp("internvl") / "model"))


ASKED = [
    (f"w{3 + n} w{9 + n} w5", str(n), questions()[4 * n][2].resize((width, height)))
    for n, (height, width) in enumerate(SIZES)
]


@pytest.mark.parametrize(
    ("served", "setting"),
    [
        (DIVPRUNE, {"method": "divprune", "keep": 20}),
        (None, {"method": "pool", "keep": 4}),
        (None, {"method": "random", "keep": 0.5, "seed": 3}),
        ('{"method": "none"}', {}),
    ],
    ids=["divprune", "pool", "random", "none"],
)
def test_as_in_transformers(served: Any, setting: Any, folder: str, engines: Any) -> None:
    text = json.dumps(setting)
    llm = engines(served or text, folder, ARCHITECTURE, **OPTIONS)
    got = assert_as_in_transformers(llm, folder, text, PROMPT, ASKED)
    if setting.get("method") == "pool":
        assert [own.prompt - 5 for own in got] == [4 * tiles for tiles in SIZES.values()]


def test_chunks_and_several_images(folder: str, engines: Any) -> None:
    whole = engines(DIVPRUNE, folder, ARCHITECTURE, **OPTIONS)
    short = engines(DIVPRUNE, folder, ARCHITECTURE, enable_prefix_caching=False,
                    max_num_batched_tokens=32, max_model_len=512, **OPTIONS)  # fmt: skip
    images = [image for _, _, image in ASKED]
    requests = two_images(PROMPT, images, 4, 2, 30)
    assert_alike(short, [whole, whole, short], requests)


def test_videos_keep_their_tokens(folder: str, engines: Any) -> None:
    llm = engines(DIVPRUNE, folder, ARCHITECTURE, **OPTIONS)
    model, processor = loaded(folder)
    frames = np.stack([np.array(image.resize((24, 24))) for _, _, image in ASKED])
    inputs = processor(videos=[frames], text="<video>\n w3 w4", return_tensors="pt")
    want = generate(model, processor, inputs)
    (got,) = ask(llm, [{"prompt": "<video>\n w3 w4", "multi_modal_data": {"video": frames}}])
    assert (got.prompt, got.text) == (want.prompt, want.text)
    assert furthest(got, want) < 1e-4


def test_encoder_runs_few_tiles_at_a_time(folder: str, engines: Any) -> None:
    llm = engines(DIVPRUNE, folder, ARCHITECTURE, enable_prefix_caching=False,
                  max_num_batched_tokens=32, max_model_len=512, **OPTIONS)  # fmt: skip
    (model,) = llm.apply_model(lambda model: model)
    assert model.at_once == 3
    runs: list[int] = []
    handle = model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: runs.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    image = ASKED[0][2].rotate(90)
    ask(llm, [{"prompt": PROMPT.format("w4 w3"), "multi_modal_data": {"image": own}}
              for own in (image, image.rotate(90), image.rotate(180), image.resize((24, 72)))]
    )  # fmt: skip
    handle.remove()
    assert sum(runs) == 7
    assert max(runs) == 4  # an image is not cut
