"""Requests of every kind, alone and together, with and without the caches of vLLM."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from serving_case import Answer, ask, engine, model_of, questions, request
from vllm import LLM

SETTING = json.dumps({"method": "divprune", "options": {"keep": 64}, "max_keep": 144})


def requests() -> list[dict[str, Any]]:
    """Several shapes of images, none, two of them, keeps of their own, repeats."""
    (one, _, a), (two, _, b), (three, _, c) = questions()[0], questions()[4], questions()[8]
    return [
        request(one, a),
        request(two, b.resize((640, 300)), keep=16),
        request(three, c.resize((80, 333))),
        request("what is a circle?"),
        request("what is in both?", a, b),
        request(one, a, keep=40),
        request(one, a, keep=0.25),
        request(two, a),
        request(three, c.resize((80, 333))),
        request(one, a),
    ]


def lengths(answers: list[Answer]) -> list[int]:
    return [own.prompt for own in answers]


@pytest.fixture(scope="module")
def plain(engines: Any) -> list[Answer]:
    """One after the other, without any cache."""
    llm = engines(SETTING, enable_prefix_caching=False, mm_processor_cache_gb=0)
    return [own for each in requests() for own in ask(llm, [each])]


def test_lengths(plain: list[Answer]) -> None:
    text = [own.prompt - n for own, n in zip(plain, (64, 16, 64, 0, 128, 40, 144, 64, 64, 64))]
    assert text[0] == text[5] == text[6] == text[9]
    assert text[2] == text[8]
    assert max(text) < 20


@pytest.mark.parametrize(
    "options",
    [
        {"enable_prefix_caching": True},
        {"enable_prefix_caching": True, "max_num_batched_tokens": 48, "max_model_len": 512},
        {"enable_prefix_caching": False, "max_num_batched_tokens": 48, "max_model_len": 512},
    ],
    ids=["prefix cache", "prefix cache, chunks", "chunks"],
)
def test_together_and_again(options: dict[str, Any], engines: Any, plain: list[Answer]) -> None:
    llm = engines(SETTING, **options)
    for _ in range(2):
        got = ask(llm, requests())
        assert [(own.text, own.prompt) for own in got] == [(o.text, o.prompt) for o in plain]
        for own, want in zip(got, plain):
            assert own.first == pytest.approx(want.first, abs=1e-4)


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({"keep": 145}, "at most 144; raise max_keep"),
        ({"keep": 0}, "keep=0"),
        ({"keep": "many"}, "a number of tokens or a fraction"),
        ({"keep": 3, "method": "grid"}, "nothing else"),
    ],
)
def test_bad_keep_is_refused(own: dict[str, Any], words: str, engines: Any) -> None:
    llm = engines(SETTING, enable_prefix_caching=True)
    bad = {**requests()[0], "mm_processor_kwargs": {"tokprune": own}}
    with pytest.raises(ValueError, match=words):
        ask(llm, [bad])
    assert ask(llm, [requests()[0]])  # nothing is broken


def hashes(llm: LLM, **more: Any) -> list[str]:
    """Of the image of a request, as its caches know it."""
    made = llm.renderer.render_cmpl([{**requests()[0], **more}])
    return list(made[0]["mm_hashes"]["image"])


def test_engines_know_their_images_apart(engines: Any) -> None:
    a = engines(SETTING, enable_prefix_caching=True)
    b = engines(json.dumps({"method": "pool", "keep": 64}))
    digest = model_of(a).hosts.setting.digest
    (own,), (other,) = hashes(a), hashes(b)
    assert own.endswith(f"-tokprune-{digest}")
    assert own != other
    uuid = {"multi_modal_uuids": {"image": ["mine"]}}
    assert hashes(a, **uuid) == [f"mine-tokprune-{digest}"]
    with_keep = {"mm_processor_kwargs": {"tokprune": {"keep": 9}}}
    assert len({own, *hashes(a, **with_keep), *hashes(a, **uuid, **with_keep)}) == 3


def test_features_of_a_client_are_not_touched(engines: Any) -> None:
    llm = engines(SETTING, enable_mm_embeds=True, enable_prefix_caching=False)
    question, _, image = questions()[0]
    features = torch.randn(1, 30, 192, generator=torch.Generator().manual_seed(0))
    own = {**request(question, image), "multi_modal_data": {"image": features}}
    got, pruned = ask(llm, [own, request(question, image)])
    assert got.prompt == pruned.prompt - 64 + 30


def test_tower_runs_few_images_at_a_time(engines: Any) -> None:
    llm = engines(SETTING, max_num_batched_tokens=1200, enable_prefix_caching=False)
    model, seen = model_of(llm), []
    assert model.at_once == 2
    model.watch = lambda left: seen.append(len(left))
    images = {name: image for _, name, image in questions()}
    ask(llm, [request("how many shapes are there?", image) for image in images.values()])
    assert max(seen) == 2
    assert sum(seen) == len(images) > 5


def test_all_tokens_of_a_tower_that_is_built_whole(engines: Any) -> None:
    setting = {"method": "todre", "options": {"keep": 64, "stage2": False}, "max_keep": 1.0}
    plain, llm = engines('{"method": "none"}'), engines(json.dumps(setting))
    (question, _, image), own = questions()[0], {"keep": 1.0}
    (want,), (got,) = (
        ask(e, [request(question, image, **k)]) for e, k in ((plain, {}), (llm, own))
    )
    assert got.prompt == want.prompt
    assert got.first == pytest.approx(want.first, abs=1e-4)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"method": "fastv", "keep": 64}, "one length for all layers"),
        ({"method": "todre", "keep": 64}, "one length for all layers"),
        ({"method": "prumerge"}, "depends on the picture"),
        ({"method": "divprune", "keep": 64, "positions": "preserve"}, "only with M-RoPE"),
        ({"method": "divprun", "keep": 64}, "Did you mean 'divprune'"),
    ],
)
def test_engine_does_not_start(setting: dict[str, Any], words: str) -> None:
    with pytest.raises(Exception, match=words):
        engine(json.dumps(setting))
