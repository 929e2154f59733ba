"""Patched models of the original package: generations of every kind, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from methods_table import CORE
from original import (
    answer,
    any_positions,
    compressed_logits,
    continuation_tokens,
    expanded_mask,
)
from transformers import DynamicCache, LlavaForConditionalGeneration

import tokprune
from tokprune.engine.shared_encoder import SharedEncoder
from tokprune.families import bind, family_of
from tokprune.testing.checks.leftovers import fingerprint
from tokprune.testing.oracle import assert_same_logits


@pytest.fixture(params=["square", "anyres"])
def form(request: pytest.FixtureRequest, original: Callable[..., Any]) -> Any:
    return original(request.param)


@pytest.mark.parametrize("case", CORE)
def test_model_is_as_before_after_compress(form: Any, case: str) -> None:
    method, options = CORE[case]
    model, inputs = form.model, form.inputs("ragged")
    before = fingerprint(model)
    with torch.no_grad():
        want = model(**inputs).logits
        with tokprune.compress(model, method, **options):
            assert tokprune.is_patched(model)
            short = model(**inputs).logits
        got = model(**inputs).logits
    assert short.shape[1] < want.shape[1]
    assert torch.equal(got, want)
    assert fingerprint(model) == before
    assert not tokprune.is_patched(model)


class Boom(Exception):
    pass


@pytest.mark.parametrize("place", ["tower", "projector", "layer", "attention"])
@pytest.mark.parametrize("case", CORE)
def test_after_an_exception(form: Any, case: str, place: str) -> None:
    """An error anywhere in generate() leaves nothing that a later prompt could meet."""
    method, options = CORE[case]
    model, inputs = form.model, form.inputs("one")
    before = fingerprint(model)
    module = {
        "tower": model.get_vision_tower().vision_tower,
        "projector": model.model.mm_projector,
        "layer": model.model.layers[3],
        "attention": model.model.layers[1].self_attn.o_proj,
    }[place]

    def boom(*_: Any) -> None:
        raise Boom

    text = torch.tensor([[5, 6, 7, 8]])
    plain = model.generate(text, max_new_tokens=2, do_sample=False)
    with tokprune.compress(model, method, **options):
        want = answer(model, inputs, 3)
        handle = module.register_forward_pre_hook(boom)
        for run in (lambda: answer(model, inputs, 3), lambda: model(**inputs)):
            with pytest.raises(Boom):
                run()
        handle.remove()
        assert torch.equal(model.generate(text, max_new_tokens=2, do_sample=False), plain)
        assert torch.equal(answer(model, inputs, 3), want)
    assert fingerprint(model) == before


@pytest.mark.parametrize("case", CORE)
def test_beams_score_what_they_return(form: Any, case: str) -> None:
    """The score of a returned beam is the log-probability of its tokens after the prompt."""
    method, options = CORE[case]
    model, inputs = form.model, form.inputs("one")
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    with tokprune.compress(model, method, **options), torch.no_grad():
        out = model.generate(
            inputs["input_ids"], **rest, num_beams=3, num_return_sequences=2, max_new_tokens=4,
            length_penalty=0.0, do_sample=False, return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        for tokens, score in zip(out.sequences[:, 1:], out.sequences_scores):
            logits = compressed_logits(model, inputs, tokens[None, :-1])
            own = logits.log_softmax(-1).gather(2, tokens[None, :, None]).sum()
            torch.testing.assert_close(own, score, atol=2e-4, rtol=1e-4)


def test_samples_repeat_the_prompt(form: Any) -> None:
    model, inputs = form.model, form.inputs("ragged")
    with tokprune.compress(model, "todre", **CORE["todre"][1]):
        want = answer(model, inputs, 4)
        got = answer(model, inputs, 4, do_sample=True, top_k=1, num_return_sequences=2)
    assert torch.equal(got, want.repeat_interleave(2, 0))


@pytest.mark.parametrize("case", CORE)
def test_generations_do_not_know_of_each_other(form: Any, case: str) -> None:
    method, options = CORE[case]
    model, one, two = form.model, form.inputs("one"), form.inputs("ragged")
    text = torch.tensor([[5, 6, 7, 8]])
    plain = model.generate(text, max_new_tokens=3, do_sample=False)
    with torch.inference_mode(), tokprune.compress(model, method, **options) as trace:
        first = answer(model, one, 3)
        second = answer(model, two, 3)
        assert torch.equal(answer(model, one, 3), first)
        assert torch.equal(model.generate(text, max_new_tokens=3, do_sample=False), plain)
        assert torch.equal(answer(model, two, 3), second)
        assert trace.prefills == 4
    with tokprune.compress(model, method, **options):
        assert torch.equal(answer(model, two, 3), second)


def test_a_prompt_is_not_taken_for_another(form: Any) -> None:
    """Embeddings of the same shape, given after a generate() that failed before its first forward,
    and inside one that goes on: nobody said where their images are."""
    model, inputs = form.model, form.inputs("one")
    other = torch.randn(2, expanded_mask(model, inputs).shape[1], 32)

    def ask(*_: Any) -> Any:
        return model(inputs_embeds=other)

    with tokprune.compress(model, "grid", keep=9), torch.no_grad():
        with pytest.raises(ValueError, match="nonsense"):
            answer(model, inputs, 2, nonsense=1)
        with pytest.raises(ValueError, match="pass input_ids and images"):
            ask()
        sampled = {"do_sample": True, "num_return_sequences": 2}
        assert answer(model, inputs, 2, **sampled).shape == (2, 2)
        with pytest.raises(ValueError, match="pass input_ids and images"):
            answer(model, inputs, 2, logits_processor=[ask], **sampled)


def test_text_only_forward_passes_untouched(form: Any) -> None:
    ids = torch.tensor([[5, 6, 7, 8], [0, 0, 3, 4]])
    with torch.no_grad():
        want = form.model(ids, (ids > 0).long())
        with tokprune.compress(form.model, "flowcut", keep=9) as trace:
            got = form.model(ids, (ids > 0).long())
    assert torch.equal(got.logits, want.logits)
    assert isinstance(got.past_key_values, tuple)
    assert trace.prefills == 0


@pytest.mark.parametrize(("prompt", "attention"), [("one", "sdpa"), ("ragged", "eager")])
@pytest.mark.parametrize("case", CORE)
def test_a_second_turn_of_several_tokens(
    original: Callable[..., Any], case: str, prompt: str, attention: str
) -> None:
    """All tokens of the turn at once, or one by one: the same logits. (sdpa of transformers 4.37
    cannot continue a batch padded on the left by several tokens, patched or not.)"""
    method, options = CORE[case]
    form = original("anyres", attention)
    model, inputs = form.model, form.inputs(prompt)
    turn = continuation_tokens(len(inputs["input_ids"]), 3)
    mask = torch.cat([expanded_mask(model, inputs), torch.ones_like(turn)], dim=1)
    positions = (mask.cumsum(1) - 1)[:, -3:]
    with tokprune.compress(model, method, **options), torch.no_grad():
        want = compressed_logits(model, inputs, turn)[:, 1:]
        out = model(**inputs, position_ids=any_positions(inputs), use_cache=True)
        got = model(turn, mask, positions, out.past_key_values).logits
    assert_same_logits(got, want)


@pytest.mark.parametrize("case", CORE)
def test_without_a_cache(form: Any, case: str) -> None:
    method, options = CORE[case]
    inputs = form.inputs("ragged")
    with tokprune.compress(form.model, method, **options), torch.no_grad():
        want = form.model(**inputs, use_cache=True).logits
        out = form.model(**inputs, use_cache=False)
    assert out.past_key_values is None
    assert_same_logits(out.logits, want)


def test_padding_side_does_not_matter(form: Any) -> None:
    inputs = form.inputs("ragged")
    right = form.build(tokenizer_padding_side="right")
    last = []
    for model in (form.model, right):
        with tokprune.compress(model, "visionzip", keep=9), torch.no_grad():
            out = model(**inputs, position_ids=any_positions(inputs))
        last.append(out.logits[:, -1])  # shortened rows are padded on the left, whatever came in
    assert_same_logits(last[1], last[0])


def test_half_precision(form: Any) -> None:
    model = form.build().to(torch.bfloat16)
    inputs = form.inputs("ragged")
    images = inputs["images"]
    if isinstance(images, list):
        inputs["images"] = [x.to(torch.bfloat16) for x in images]
    else:
        inputs["images"] = images.to(torch.bfloat16)
    for method, options in CORE.values():
        with tokprune.compress(model, method, **options), torch.no_grad():
            assert bool(model(**inputs).logits.isfinite().all())


def test_prepared_embeddings_may_be_passed_on(form: Any) -> None:
    """As custom loops do: prepare, then the forward."""
    inputs = form.inputs("one")
    model = form.model

    def prepared() -> Any:
        return model.prepare_inputs_labels_for_multimodal(
            inputs["input_ids"], None, inputs["attention_mask"], None, None, inputs["images"],
            inputs.get("image_sizes"),
        )  # fmt: skip

    with torch.no_grad(), tokprune.compress(model, "flowcut", keep=9):
        want = model(**inputs).logits
        _, positions, mask, _, embeds, _ = prepared()
        got = model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).logits
        assert torch.equal(got, want)
        with pytest.raises(ValueError, match="pass input_ids and images"):
            model(inputs_embeds=embeds.clone(), attention_mask=mask)
    with torch.no_grad():
        plain = prepared()[4]
    with torch.no_grad(), tokprune.compress(model, "fastv", keep=9):
        with pytest.raises(ValueError, match="prepared before the model was patched"):
            model(inputs_embeds=embeds)
        with pytest.raises(ValueError, match="visual_positions"):
            model(inputs_embeds=plain)
        visual = torch.zeros(embeds.shape[:2], dtype=torch.bool)
        visual[:, 4:-6] = True
        with tokprune.visual_positions(visual):
            got = model(inputs_embeds=plain).logits
        assert torch.equal(got, model(**inputs).logits)


# ------------------------------------------------------------------------------- refusals


def test_a_compressed_cache_wants_a_patched_model(form: Any) -> None:
    inputs = form.inputs("one")
    with torch.no_grad():
        with tokprune.compress(form.model, "fastv", keep=7, prune_before=2):
            cache = form.model(**inputs, use_cache=True).past_key_values
        with pytest.raises(RuntimeError, match="is not patched"):
            form.model(torch.tensor([[5]]), past_key_values=cache)


@pytest.mark.parametrize("kind", ["tuple", "DynamicCache"])
def test_a_cache_of_an_unpatched_turn_cannot_take_images(form: Any, kind: str) -> None:
    model, inputs = form.model, form.inputs("one")
    with torch.no_grad():
        cache = model(torch.tensor([[5, 6]]), use_cache=True).past_key_values
        if kind == "DynamicCache":
            cache = DynamicCache.from_legacy_cache(cache)
        inputs["attention_mask"] = None
        with tokprune.compress(model, "grid", keep=9):
            with pytest.raises(tokprune.UnsupportedModelError, match=f"past_key_values={kind}"):
                model(**inputs, past_key_values=cache)


def test_contrastive_search_is_refused(form: Any) -> None:
    with tokprune.compress(form.model, "grid", keep=9):
        with pytest.raises(tokprune.UnsupportedModelError, match="contrastive search"):
            answer(form.model, form.inputs("one"), 3, penalty_alpha=0.6, top_k=4)


def test_attention_maps_need_eager(form: Any) -> None:
    inputs = form.inputs("one")
    with tokprune.compress(form.model, "fastv", keep=9), torch.no_grad():
        with pytest.raises(ValueError, match="attn_implementation='eager'"):
            form.model(**inputs, output_attentions=True)
        assert form.model(**inputs).logits.isfinite().all()
    eager = form.build("eager")
    with tokprune.compress(eager, "fastv", keep=9, prune_before=2) as trace, torch.no_grad():
        maps = eager(**inputs, output_attentions=True).attentions
    assert trace.last is not None
    assert [m.shape[-1] for m in maps] == [layer.lengths[0] for layer in trace.last.layers]


def test_models_that_cannot_be_patched_say_why(form: Any) -> None:
    sliced = form.build(pretraining_tp=2)
    with pytest.raises(tokprune.UnsupportedModelError, match="pretraining_tp=2"):
        tokprune.patch(sliced, "grid", keep=9)
    dynamic = form.build(rope_scaling={"type": "dynamic", "factor": 2.0})
    with pytest.raises(tokprune.UnsupportedModelError, match="'dynamic'"):
        tokprune.patch(dynamic, "grid", keep=9)
    unloaded = form.build()
    del unloaded.get_vision_tower().vision_tower
    with pytest.raises(tokprune.UnsupportedModelError, match="load_model"):
        tokprune.patch(unloaded, "grid", keep=9)
    for model in (sliced, dynamic, unloaded):
        assert not tokprune.is_patched(model)
    with pytest.raises(tokprune.UnsupportedModelError, match="original llava package encode"):
        SharedEncoder(bind(form.model))


def test_classes_that_are_refused_say_why() -> None:
    from llava.model.language_model.llava_mpt import LlavaMptForCausalLM

    with pytest.raises(tokprune.UnsupportedModelError, match="ALiBi"):
        family_of(LlavaMptForCausalLM.__new__(LlavaMptForCausalLM))
    with pytest.raises(tokprune.UnsupportedModelError, match=r"4\.57"):
        family_of(LlavaForConditionalGeneration.__new__(LlavaForConditionalGeneration))
    with pytest.raises(tokprune.UnsupportedModelError, match="LlavaLlamaForCausalLM"):
        family_of(SimpleNamespace())  # type: ignore[arg-type]


def test_bad_options_leave_the_model_alone(form: Any) -> None:
    before = fingerprint(form.model)
    with pytest.raises(ValueError, match="keep=100000"):
        tokprune.patch(form.model, "flowcut", keep=100000)
    with pytest.raises(ValueError, match="Did you mean"):
        tokprune.patch(form.model, "flowcutt", keep=9)
    assert fingerprint(form.model) == before


def test_attention_is_not_rectified(form: Any) -> None:
    with (
        pytest.raises(tokprune.UnsupportedModelError, match=r"rectify needs transformers ≥ 4\.57"),
        tokprune.compress(form.model, "divprune", keep=4, rectify="size"),
    ):
        pass
    assert not tokprune.is_patched(form.model)
