"""The training of the embedded model: its parts agree with the model they train, and it resumes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_run import train

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from mini_training.attention import use_for  # noqa: E402
from mini_training.labels import FIELDS, PLATE, patch_labels  # noqa: E402
from mini_training.model import build_model, build_processor, encode  # noqa: E402
from mini_training.packing import HEAD  # noqa: E402
from mini_training.turns import draw_turns, pack  # noqa: E402
from mini_training.vision import pixels_of, tower_features  # noqa: E402

from tokprune.eval.benchmarks import load_benchmark  # noqa: E402
from tokprune.eval.benchmarks.mini.scene import make_scene, random_state  # noqa: E402
from tokprune.eval.benchmarks.mini.world import GRID  # noqa: E402


@pytest.fixture(scope="module")
def model() -> Any:
    return build_model().eval()


@pytest.fixture(scope="module")
def processor() -> Any:
    return build_processor()


def test_tokenizer_spells_questions_and_answers_as_training_does(processor: Any) -> None:
    tokenizer = processor.tokenizer
    for item in load_benchmark("mini").items("quick"):
        for text in (item.question, item.answers[0]):
            ids = tokenizer(text, add_special_tokens=False).input_ids
            assert ids == encode(text)
            assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(encode(item.answers[0])) == item.answers[0]


def test_labels_say_what_stands_where() -> None:
    scene = make_scene(9, 4)
    label = patch_labels(scene).reshape(GRID, GRID, len(FIELDS))
    role = label[:, :, list(FIELDS).index("role")]
    assert (role == 1).sum() == len(scene.things) + len(scene.distractors) + sum(
        len(p.text) for p in scene.plates
    )
    kind = label[:, :, 0]
    assert (kind == PLATE).sum() == sum(2 * p.width for p in scene.plates)


def test_packed_turns_equal_single_prompts(model: Any, processor: Any) -> None:
    """A turn in a packed sequence gets the logits of the prompt that a user would send."""
    scene = make_scene(9, 1)
    turns = draw_turns(scene, random_state(scene.key, "test"), 3)
    pixels, raw = pixels_of([scene])
    batch = pack([np.arange(GRID * GRID)], [turns])
    embed = model.get_input_embeddings()
    with torch.no_grad():
        hidden, _ = tower_features(model, pixels)
        visual = model.model.multi_modal_projector(hidden[:, 1:])
        inputs = torch.cat([embed(torch.tensor([HEAD])), visual, embed(batch.text)], dim=1)
        output = model.model.language_model(
            inputs_embeds=inputs,
            attention_mask=torch.zeros(batch.mask.shape).masked_fill(~batch.mask, -1e9),
            position_ids=batch.position,
        ).last_hidden_state
        packed = model.lm_head(output[batch.row, batch.column])
    from PIL import Image

    at = 0
    for turn in turns:
        words = processor.tokenizer.decode(turn.question[:-2])
        text = f"USER: <image>\n{words} ASSISTANT:"
        single = processor(images=[Image.fromarray(raw[0])], text=text, return_tensors="pt")
        assert torch.allclose(single["pixel_values"], pixels, atol=1e-5)
        with torch.no_grad():
            logits = model(**single).logits[0, -1]
        assert torch.allclose(packed[at], logits, atol=1e-4), words
        at += len(turn.answer)


def test_attention_in_pieces_equals_the_fused_kernel(model: Any) -> None:
    pixels, _ = pixels_of([make_scene(9, 2), make_scene(9, 3)])
    model.train()
    results = []
    for own in (True, False):
        if own:
            use_for(model, torch.device("cpu"))
        else:
            model.set_attn_implementation("sdpa")
        model.zero_grad()
        hidden, _ = tower_features(model, pixels)
        hidden.square().mean().backward()
        weight = model.model.vision_tower.get_submodule(_first_query(model)).weight
        results.append((hidden.detach(), weight.grad.clone()))
    model.eval()
    for a, b in zip(*results):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def _first_query(model: Any) -> str:
    return next(
        n for n, _ in model.model.vision_tower.named_modules() if n.endswith("0.self_attn.q_proj")
    )


@pytest.mark.slow
def test_every_phase_runs_resumes_and_ships(tmp_path: Path) -> None:
    sizes = ["--language-scenes", "8", "--vision-scenes", "16", "--joint-scenes", "8",
             "--check-batches", "1"]  # fmt: skip
    train("train_mini.py", tmp_path, *sizes, "--save", str(tmp_path / "model"))
    for phase in ("language", "vision", "joint"):
        entry = json.loads((tmp_path / phase / "log.jsonl").read_text().splitlines()[-1])
        assert entry["check"]
    out = train("train_mini.py", tmp_path, "--phase", "language", "--language-scenes", "16",
                "--check-batches", "1")  # fmt: skip
    assert "resumed at 8 scenes" in out
    import tokprune

    model, processor = tokprune.load(tmp_path / "model", "divprune", keep=64, processor=True)
    scene = load_benchmark("mini")
    item = scene.items("quick")[0]
    inputs = processor(
        images=[scene.image(item)], text=f"USER: <image>\n{item.question} ASSISTANT:",
        return_tensors="pt",
    )  # fmt: skip
    model.float()
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 1
