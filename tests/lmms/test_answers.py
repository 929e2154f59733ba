"""Answers of a wrapped model: prompts, numbers, failures, controls, batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import bases
import pytest
import tiny_processor
import torch
from lmms_eval.api.instance import Instance
from lmms_eval.models import MODEL_REGISTRY_V2
from lmms_eval.models.registry_v2 import ModelManifest
from pictures import landscape
from requests_of import BENCHMARK, inputs_of, items, model_of, requests, told

import tokprune
from tokprune.eval.sweep.reduced_input import blank, downsample
from tokprune.inputs.prompts import encode, model_inputs, prompt_text
from tokprune.integrations.lmms_eval.counts import Sample, mean
from tokprune.integrations.lmms_eval.tasks import mini

TODRE = "method=todre,keep=64"
Load = Callable[..., Any]


@pytest.fixture(autouse=True)
def _batched() -> Iterator[None]:
    manifest = ModelManifest("test_batched", simple_class_path="bases.Batched")
    MODEL_REGISTRY_V2.register_manifest(manifest, overwrite=True)
    yield
    MODEL_REGISTRY_V2._manifests.pop("test_batched")
    MODEL_REGISTRY_V2._alias_to_model_id.pop("test_batched")


def broken(lm: Any, *calls: int) -> None:
    """These calls of the model's own ``generate`` raise."""
    own, count = lm._tokprune.observer._generate, iter(range(10**6))

    def generate(*args: Any, **kwargs: Any) -> Any:
        if next(count) in calls:
            raise RuntimeError("out of\n  luck")
        return own(*args, **kwargs)

    lm._tokprune.observer._generate = generate


# ------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize("simple", [False, True])
def test_prompt_and_pixels_are_those_of_our_own_harness(load: Load, simple: bool) -> None:
    lm = load(simple=simple)
    assert lm.is_simple is simple
    seen = inputs_of(lm)
    chosen = items(3)
    lm.generate_until(requests(lm, chosen))
    assert len(seen) == 3
    for item, given in zip(chosen, seen):
        own = encode(lm._image_processor, [item.question], [BENCHMARK.image(item)], "cpu")
        assert torch.equal(given["input_ids"], own["input_ids"])
        assert torch.equal(given["pixel_values"], own["pixel_values"])


# ------------------------------------------------------------------------------- numbers


def test_numbers_are_those_of_the_trace(load: Load) -> None:
    lm = load(TODRE)
    (first,) = told(lm.generate_until(requests(lm, items(1))))
    trace = tokprune.trace_of(model_of(lm))
    assert trace is not None
    expected = trace.to_dict()
    assert first["tokens_in"] == expected["visual_tokens_in"][0] == 576
    assert first["tokens_last"] == expected["visual_tokens_out"][0] == 64
    assert first["macs"] == expected["macs"]["total"] < first["macs_unpruned"]
    assert first["macs_unpruned"] == expected["macs_unpruned"]["total"]
    assert first["kv_bytes"] == expected["kv_bytes"] < first["kv_bytes_unpruned"]
    assert first["kv_bytes_unpruned"] == expected["kv_bytes_unpruned"]
    assert first["prompt_tokens"] == expected["tokens_in"][0]
    assert first["new_tokens"] == expected["decode_steps"] + 1
    assert first["images"] == 1
    assert 0 < first["prefill_seconds"] < first["seconds"]
    assert (first["status"], first["error"]) == ("ok", None)


def test_unpruned_model_is_measured_as_well(load: Load) -> None:
    lm = load()
    (first,) = told(lm.generate_until(requests(lm, items(1))))
    assert first["tokens_in"] == first["tokens_last"] == first["tokens_mean"] == 576
    assert first["macs"] == first["macs_unpruned"] > 0
    assert 0 < first["prefill_seconds"] < first["seconds"]


def test_model_is_left_as_it_was(load: Load) -> None:
    lm = load(TODRE)
    model = model_of(lm)
    assert tokprune.is_patched(model)
    assert "generate" in vars(model)
    lm.clean()
    assert not tokprune.is_patched(model)
    assert "generate" not in vars(model)
    assert not model._forward_hooks


def test_arguments_of_requests_stay_as_they_are(load: Load) -> None:
    """llava_hf changes them; a response cache would then never find its answers again."""
    lm = load(simple=True)
    made = requests(lm, items(1))
    before = dict(made[0].args[1])
    lm.generate_until(made)
    assert made[0].args[1] == before


def test_means_of_samples() -> None:
    both = mean([Sample(macs=2, seconds=1.0), Sample(macs=4, error="no"), Sample(error="never")])
    assert both == Sample(macs=3.0, seconds=1.0, error="no")


def test_prompt_without_an_image_costs_what_it_costs(load: Load) -> None:
    lm = load("method=todre,option.keep=64", start=bases.START, simple=True)
    (first,) = told(lm.generate_until(requests(lm, items(1), see=lambda doc: [])))
    assert (first["images"], first["tokens_in"], first["tokens_last"]) == (0, 0, 0)
    assert first["status"] == "ok"
    assert first["macs"] == first["macs_unpruned"] > 0


# ------------------------------------------------------------------------------ failures


def test_swallowed_errors_are_failures(load: Load, said: list[str]) -> None:
    """llava_hf answers nothing where ``generate`` raises, and says so in its log only."""
    lm = load(TODRE)
    broken(lm, 1)
    results = lm.generate_until(requests(lm, items(3)))
    first, second, third = told(results)
    assert second["error"] == "RuntimeError: out of luck"
    assert second["status"] == "failed"
    assert results[1].text == ""
    assert first["status"] == third["status"] == "ok"
    assert results[0].text
    assert results[2].text
    assert any("1 of 3 samples failed and counts as an incorrect answer" in line for line in said)


def test_errors_on_the_way_to_the_model_fail_alone(load: Load) -> None:
    lm = load(TODRE)
    chosen = items(3)

    def see(doc: Any) -> Any:
        if doc["id"] == chosen[1].id:
            raise OSError("cannot identify image file")
        return mini.doc_to_visual(doc)

    first, second, third = told(lm.generate_until(requests(lm, chosen, see)))
    assert second["error"] == "OSError: cannot identify image file"
    assert first["status"] == third["status"] == "ok"


def test_uncompressed_answer_is_a_failure(load: Load, said: list[str]) -> None:
    lm = load(TODRE)
    tokprune.unpatch(model_of(lm))
    (result,) = lm.generate_until(requests(lm, items(1)))
    (first,) = told([result])
    assert "nothing was compressed" in first["error"]
    assert result.text == ""
    assert any("every one of 1 samples failed" in line for line in said)


def test_run_that_cannot_work_is_given_up(load: Load) -> None:
    lm = load(TODRE)
    broken(lm, *range(100))
    with pytest.raises(RuntimeError, match=r"the first 8 samples have all failed: .*out of luck"):
        lm.generate_until(requests(lm, items(20)))
    assert len(lm._tokprune.samples) == 8


# ------------------------------------------------------------------------------ controls


@pytest.mark.parametrize("simple", [False, True])
@pytest.mark.parametrize(
    ("control", "change"),
    [
        ("control=blind", blank),
        ("control=downsample,factor=4", lambda image: downsample(image, 4.0)),
    ],
)
def test_controls_change_the_image_and_leave_the_model(
    load: Load, control: str, change: Any, simple: bool
) -> None:
    lm = load(control, simple=simple)
    assert not tokprune.is_patched(model_of(lm))
    seen = inputs_of(lm)
    (item,) = items(1)
    (first,) = told(lm.generate_until(requests(lm, [item])))
    own = encode(lm._image_processor, [item.question], [change(BENCHMARK.image(item))], "cpu")
    assert torch.equal(seen[0]["pixel_values"], own["pixel_values"])
    assert torch.equal(seen[0]["input_ids"], own["input_ids"])
    assert first["tokens_in"] == first["tokens_last"] == 576


def test_control_refuses_what_is_no_image(load: Load) -> None:
    lm = load("control=blind")
    (first,) = told(lm.generate_until(requests(lm, items(1), see=lambda doc: ["film.mp4"])))
    assert first["error"] == "ValueError: control needs images, and this task gives str: 'film.mp4'"


def test_tiles_of_smaller_images(load: Load, tmp_path: Path) -> None:
    """A smaller image has fewer tiles; what the given one would cost is then not known."""
    tiny_processor.save(tmp_path, "llava_next", layers=6)
    start = f"base=llava_hf,pretrained={tmp_path},dtype=float32"

    def see(doc: Any) -> list[Any]:
        return [landscape().resize((64, 24))]

    def first(more: str) -> dict[str, Any]:
        lm = load(more, start=start)
        return told(lm.generate_until(requests(lm, items(1), see)))[0]

    plain, pruned = first(""), first("method=todre,keep=18")
    small = first("control=downsample,factor=4")
    assert plain["tokens_in"] > 36
    for name in ("tokens_in", "macs_unpruned", "kv_bytes_unpruned", "prompt_tokens"):
        assert plain[name] == pruned[name]
        assert small[name] is None
    assert plain["macs"] == plain["macs_unpruned"] > small["macs"] > 0
    assert pruned["tokens_last"] < small["tokens_last"] < plain["tokens_last"]


# ------------------------------------------------------------------------------- batches


def test_rows_of_a_batch_carry_its_means(load: Load) -> None:
    chosen = items(4)
    alone = load("method=fastv,option.keep=64", start=bases.START)
    singles = alone.generate_until(requests(alone, chosen))
    batched = load("method=fastv,option.keep=64", start=bases.START, batch_size=2)
    both = batched.generate_until(requests(batched, chosen))
    assert [r.text for r in both] == [r.text for r in singles]
    one, two = told(singles), told(both)
    lengths = [n["prompt_tokens"] for n in one]
    assert len(set(lengths[:2])) == 2, "questions of one length show nothing"
    for start in (0, 2):
        for name in ("macs", "prompt_tokens", "tokens_mean", "kv_bytes", "new_tokens"):
            expected = fmean(n[name] for n in one[start : start + 2])
            assert two[start][name] == two[start + 1][name] == pytest.approx(expected, abs=1e-4)


def test_error_of_a_batch_is_put_on_who_caused_it(load: Load) -> None:
    lm = load("method=todre,option.keep=64", start=bases.START, batch_size=2)
    broken(lm, 0, 2)  # the first batch, then its second question alone
    first, second, third, fourth = told(lm.generate_until(requests(lm, items(4))))
    assert second["error"] == "RuntimeError: out of luck"
    assert first["status"] == third["status"] == fourth["status"] == "ok"
    assert first["images"] == 1


# -------------------------------------------------------------------------- other requests


def test_several_rounds_are_compressed(load: Load, said: list[str]) -> None:
    lm = load("method=todre,option.keep=64", start=bases.START, simple=True)
    made = requests(lm, items(2))
    for request in made:
        request.arguments = (*request.args[:3], None, *request.args[3:])
    rounds = lm.generate_until_multi_round(made)
    trace = tokprune.trace_of(model_of(lm))
    assert trace is not None
    assert trace.prefills == len(rounds) == 2
    assert said == []
    tokprune.unpatch(model_of(lm))
    lm.generate_until_multi_round(made)
    assert any("nothing was compressed" in line for line in said)
    blind = load("control=blind", start=bases.START, simple=True)
    with pytest.raises(NotImplementedError, match="generate_until_multi_round"):
        blind.generate_until_multi_round(made)


def choices(lm: Any, texts: list[str]) -> list[Any]:
    """``loglikelihood`` requests: every text as the answer of the first question."""
    (item,) = items(1)
    lm.task_dict["t"] = {"test": [mini._doc(item)]}
    about = {"task": "t", "doc_id": 0, "repeats": 1}
    return [
        Instance(
            "loglikelihood", (item.question, text, mini.doc_to_visual, 0, "t", "test"), n, about
        )
        for n, text in enumerate(texts)
    ]


@pytest.mark.parametrize("more", ["", "method=divprune,keep=144", "method=fastv,keep=144"])
def test_choices_are_ranked_by_likelihood(load: Load, more: str) -> None:
    """Most models of lmms-eval answer no such request, and none under a method."""
    (item,) = items(1)
    lm = load(more)
    texts = [item.answers[0], "zebra", "yes" if item.answers[0] != "yes" else "no"]
    found = lm.loglikelihood(choices(lm, texts))
    assert [number for number, (loss, _) in enumerate(found) if loss == min(found)[0]] == [0]
    assert [greedy for _, greedy in found] == [True, False, False]
    model, processor = model_of(lm), lm._image_processor
    prompt = prompt_text(processor, item.question)
    image = [[BENCHMARK.image(item)]]
    before = model_inputs(processor, [prompt], image)["input_ids"].shape[1]
    for text, (loss, _) in zip(texts, found):
        inputs = model_inputs(processor, [f"{prompt} {text}"], image)
        labels = inputs["input_ids"].clone()
        labels[:, :before] = -100
        with torch.no_grad():
            assert loss == pytest.approx(model(**inputs, labels=labels).loss.item(), rel=1e-5)


def test_choices_under_controls_and_without_images(load: Load) -> None:
    texts = ["a", "b"]
    plain, blind = load(), load("control=blind")
    assert plain.loglikelihood(choices(plain, texts)) != blind.loglikelihood(choices(blind, texts))
    lm = load(TODRE)
    made = choices(lm, texts)
    for request in made:
        context, text, _, *where = request.args
        request.arguments = (context, text, lambda doc: [], *where)
    assert len(lm.loglikelihood(made)) == 2
    tokprune.unpatch(model_of(lm))
    with pytest.raises(RuntimeError, match="nothing was compressed"):
        lm.loglikelihood(choices(lm, texts))
