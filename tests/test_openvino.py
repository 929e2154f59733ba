"""Exports for OpenVINO GenAI against OpenVINO GenAI.

Run in an environment of its own (OpenVINO GenAI 2026.4.1, optimum-intel 2.2.0, transformers 4.57.6,
torch 2.13.0 without torchvision, Python 3.11, one CPU): this optimum-intel refuses to convert the
models under transformers above 5.0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openvino_genai", reason="OpenVINO GenAI is not installed")
pytest.importorskip("optimum.intel", reason="optimum-intel, which converts models, is missing")

import openvino_case as case

from tokprune.export import export
from tokprune.integrations.engines.openvino import tokens_left
from tokprune.methods import CDPruner

SIZES = [(64, 64), (72, 40), (96, 96), (56, 72), (120, 80)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folders of a family, made once: (for transformers, for OpenVINO GenAI)."""
    made: dict[str, tuple[Path, Path]] = {}

    def get(family: str) -> tuple[Path, Path]:
        if family not in made:
            made[family] = case.save_and_convert(tmp_path_factory.mktemp("openvino"), family)
        return made[family]

    return get


@pytest.mark.parametrize("family", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl"])
def test_as_many_tokens_stay_as_the_export_says(family: str, folders: Any) -> None:
    source, converted = folders(family)
    pipe = case.pipeline(converted)
    for width, height in SIZES:
        pixels = [case.picture(0, width, height)]
        tokens = width * height // case.CELL**2
        text = case.prompt_length(pipe, pixels) - tokens
        for ratio in (1, 10, 33, 50, 67, 90):
            left = case.prompt_length(pipe, pixels, pruning_ratio=ratio) - text
            assert left == tokens_left(tokens, ratio), (tokens, ratio)
        for keep in (3, 8, 16, 0.3):
            size = (width, height)
            found = export("cdpruner", "openvino", model=source, image_size=size, keep=keep)
            left = case.prompt_length(pipe, pixels, **found.options) - text
            most = keep if isinstance(keep, int) else int(keep * tokens)
            assert most - 1 - tokens // 100 <= left <= most
            assert found.nearness[0].startswith(f"{left} of {tokens} tokens stay")


def test_every_image_keeps_its_share(folders: Any) -> None:
    pipe = case.pipeline(folders("qwen2-vl")[1])
    pixels = [case.picture(0, 64, 64), case.picture(1, 72, 40)]
    text = case.prompt_length(pipe, pixels) - 64 - 45
    for ratio in (10, 50, 75):
        left = case.prompt_length(pipe, pixels, pruning_ratio=ratio) - text
        assert left == tokens_left(64, ratio) + tokens_left(45, ratio)


def overlaps(folders: Any, relevance: Any, theta: float | None = None) -> list[float]:
    """How many of the tokens that stay in OpenVINO GenAI stay in transformers, as a share."""
    source, converted = folders("qwen2-vl")
    probe = converted.with_name(f"{converted.name}-probe")
    if not probe.exists():
        case.probe_of(converted)
    here, there = case.Here(source), case.pipeline(probe, "SDPA")
    words = here.tokenizer.get_vocab()
    shares = []
    for seed, height in enumerate((64, 40, 56, 88)):
        pixels = case.picture(seed, case.ACROSS * case.CELL, height)
        tokens = case.ACROSS * height // case.CELL
        for keep in (0.5, 0.25, 0.1):
            # the engine's own relevance is "text" to it
            name = "text" if callable(relevance) else relevance
            method = CDPruner(keep=keep, relevance=name, theta=theta)
            found = export(method, "openvino", tokens=tokens)
            left = tokens_left(tokens, found.options["pruning_ratio"])
            own = CDPruner(keep=left, relevance=relevance, theta=theta)
            kept = case.kept_there(there, words, pixels, left, **found.options)
            assert len(kept) == left
            shares.append(len(set(kept) & set(here.kept(pixels, own))) / left)
    return shares


def test_with_its_relevance_and_undivided_images_the_process_is_ours(
    folders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CDPRUNER_SPLIT_THRESHOLD", "0")
    here = case.Here(folders("qwen2-vl")[0])
    shares = overlaps(folders, here.relevance)
    assert sum(shares) / len(shares) >= 0.9
    assert shares.count(1.0) >= len(shares) / 2


@pytest.mark.parametrize("split", ["0", "1"])
@pytest.mark.parametrize(("relevance", "least"), [("text", 0.7), ("none", 0.35)])
def test_how_near_exports_are(
    relevance: str, least: float, split: str, folders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CDPRUNER_SPLIT_THRESHOLD", split)
    shares = overlaps(folders, relevance)
    assert sum(shares) / len(shares) >= least
