"""The training of the embedded video model: its parts agree with the model they train."""

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

from mini_training.packing import HEAD  # noqa: E402
from mini_training.video_hints import TOKEN_HINTS, token_hints, way_of  # noqa: E402
from mini_training.video_labels import BLOCK, TOKENS, frame_labels  # noqa: E402
from mini_training.video_model import (  # noqa: E402
    build_video_model,
    build_video_tokenizer,
    encode,
)
from mini_training.video_scenes import training_clip  # noqa: E402
from mini_training.video_turns import draw_video_turns, pack_video  # noqa: E402
from mini_training.video_vision import normalised, pooled_features  # noqa: E402

import tokprune  # noqa: E402
from tokprune.eval.benchmarks import load_benchmark  # noqa: E402
from tokprune.eval.benchmarks.mini.scene import random_state  # noqa: E402
from tokprune.eval.benchmarks.mini.world import KINDS, SIDE  # noqa: E402
from tokprune.eval.benchmarks.mini_video.clip import DIRECTIONS, TASKS  # noqa: E402
from tokprune.eval.benchmarks.mini_video.make import make_clip  # noqa: E402
from tokprune.eval.benchmarks.mini_video.render import render  # noqa: E402


@pytest.fixture(scope="module")
def model() -> Any:
    return build_video_model().eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_video_tokenizer()


def test_tokenizer_spells_questions_and_answers_as_training_does(tokenizer: Any) -> None:
    for item in load_benchmark("mini-video").items("quick"):
        for text in (item.question, item.answers[0]):
            ids = tokenizer(text, add_special_tokens=False).input_ids
            assert ids == encode(text)
            assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(encode(item.answers[0])) == item.answers[0]


def test_blocks_say_where_objects_are_in_every_frame() -> None:
    clip = make_clip(9, 2, "direction")
    for frame in range(clip.frames):
        labels = frame_labels(clip, frame)
        shown = labels.actor[labels.actor >= 0].tolist()
        assert sorted(set(shown)) == sorted(shown)
        for token in np.flatnonzero(labels.actor >= 0):
            actor = clip.actors[labels.actor[token]]
            x, y = actor.at(frame) or (-1, -1)
            middle = ((y + actor.side / 2) % SIDE, (x + actor.side / 2) % SIDE)
            assert tuple(labels.place[token]) == middle
            assert token == int(middle[0]) // BLOCK * (SIDE // BLOCK) + int(middle[1]) // BLOCK
            assert labels.label[token, 0] == KINDS.index(actor.kind) + 1
    (target,) = clip.targets
    moved = clip.actors[target]
    assert list(DIRECTIONS)[way_of(moved) - 1] == clip.answer


def test_hints_are_what_happened() -> None:
    clip = make_clip(9, 3, "appeared")
    count = list(TOKEN_HINTS).index("count")
    last = clip.frames - 1
    labels = frame_labels(clip, last)
    told = token_hints(clip, last, labels)[:, count]
    assert told.max() <= int(clip.answer)
    hidden = sum(a.seen[0] > 0 and a.at(last) is not None for a in clip.actors) - len(
        [t for t in np.flatnonzero(labels.actor >= 0) if clip.actors[labels.actor[t]].seen[0] > 0]
    )
    assert told.max() == int(clip.answer) - hidden


def test_training_clips_ask_what_they_show() -> None:
    seen = set()
    for number in range(40):
        clip = training_clip(9, number)
        for turn in draw_video_turns(clip, random_state(clip.key, "test")):
            seen.add(turn.task)
            if turn.task == "moved":
                (shape,) = [a for a in clip.actors if a.color and a.step != (0, 0)]
                assert turn.answer[:-1] == encode(shape.name)
    assert seen == set(TASKS)


def test_packed_turns_equal_single_prompts(model: Any, tokenizer: Any) -> None:
    """A turn in a packed sequence gets the logits of the prompt that a user would send, and pooled
    blocks are the model's own video features."""
    clip = training_clip(9, 1)
    turns = draw_video_turns(clip, random_state(clip.key, "test"))[:3]
    raw = np.stack([np.asarray(frame) for frame in render(clip)])
    pixels = normalised(raw)
    hints = [np.full((8 * TOKENS, len(TOKEN_HINTS)), -100)]
    batch = pack_video([np.arange(8 * TOKENS)], [turns], hints, [1.0])
    embed = model.get_input_embeddings()
    with torch.no_grad():
        pooled = pooled_features(model, pixels, None).flatten(0, 1)[None]
        some = np.tile(np.arange(TOKENS)[::3], (8, 1))
        assert pooled_features(model, pixels, some).shape == (8, len(some[0]), pooled.shape[-1])
        visual = model.model.multi_modal_projector(pooled)
        inputs = torch.cat([embed(torch.tensor([HEAD])), visual, embed(batch.text)], dim=1)
        output = model.model.language_model(
            inputs_embeds=inputs,
            attention_mask=torch.zeros(batch.mask.shape).masked_fill(~batch.mask, -1e9),
            position_ids=batch.position,
        ).last_hidden_state
        packed = model.lm_head(output[batch.row, batch.column])
    at = 0
    video = "<video>" * (8 * TOKENS)
    for turn in turns:
        words = tokenizer.decode(turn.question[:-2])
        single = tokenizer(f"USER: {video}\n{words} ASSISTANT:", return_tensors="pt")
        with torch.no_grad():
            logits = model(**single, pixel_values_videos=pixels[None]).logits[0, -1]
        assert torch.allclose(packed[at], logits, atol=1e-4), words
        at += len(turn.answer)


@pytest.mark.slow
def test_every_phase_runs_resumes_and_ships(tmp_path: Path) -> None:
    sizes = ["--language-clips", "8", "--vision-clips", "10", "--joint-clips", "6",
             "--language-checked", "8", "--joint-checked", "1"]  # fmt: skip
    train("train_mini_video.py", tmp_path, *sizes, "--save", str(tmp_path / "model"))
    for phase in ("language", "vision", "joint"):
        entry = json.loads((tmp_path / phase / "log.jsonl").read_text().splitlines()[-1])
        assert entry["check"]
    assert "resumed at 8" in train(
        "train_mini_video.py",
        tmp_path,
        "--phase",
        "language",
        "--language-clips",
        "16",
        "--language-checked",
        "8",
    )
    model, processor = tokprune.load(tmp_path / "model", "evs", keep=300, processor=True)
    benchmark = load_benchmark("mini-video")
    item = benchmark.items("quick")[0]
    inputs = processor(
        videos=[benchmark.video(item)], text=f"USER: <video>\n{item.question} ASSISTANT:",
        return_tensors="pt",
    )  # fmt: skip
    model.float()
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 1
