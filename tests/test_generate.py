"""Through ``generate()``: greedy, sampling, beams, chat turns, several images, interleaving."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from methods_table import ALL, CORE
from tiny import BUILDERS, IMAGE_TOKEN, make_inputs, single
from transformers import DynamicCache

import tokprune
from tokprune.engine.cache import CompressedLayer
from tokprune.testing import assert_same_logits

PROMPTS = [[4, "image", 6], [7, "image", 9], [2, "image", 3]]
SIZES = [(20, 40), (40, 20), (30, 30)]
NEW = 6
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module", params=list(BUILDERS))
def model(request: pytest.FixtureRequest) -> Any:
    return BUILDERS[request.param]()


@pytest.fixture
def inputs(model: Any) -> dict[str, torch.Tensor]:
    return make_inputs(model, PROMPTS, SIZES)


def new_tokens(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    with torch.no_grad():
        out = model.generate(**inputs, **{**GREEDY, **options})
    return out[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("case", ALL)
def test_batch_equals_singles_through_generate(model: Any, inputs: Any, case: str) -> None:
    method, options = ALL[case]
    told = {"output_logits": True, "return_dict_in_generate": True}
    with tokprune.compress(model, method, **options), torch.no_grad():
        together = model.generate(**inputs, **GREEDY, **told)
        batch = torch.stack(together.logits, dim=1)
        for i in range(3):
            out = model.generate(**single(inputs, i, slice(i, i + 1)), **GREEDY, **told)
            own, steps = torch.stack(out.logits, dim=1), NEW
            differ = (batch[i].argmax(-1) != own[0].argmax(-1)).nonzero()
            if len(differ):  # logits that tie: what is answered after them differs
                steps = int(differ[0]) + 1
            assert_same_logits(batch[i : i + 1, :steps], own[:, :steps])


@pytest.mark.parametrize("case", CORE)
def test_cached_generation_equals_teacher_forced_steps(model: Any, inputs: Any, case: str) -> None:
    """generate() picks the argmax of the logits that single forwards on the cache give."""
    from tokprune.testing.oracle import compressed_logits

    method, options = ALL[case]
    with tokprune.compress(model, method, **options):
        tokens = new_tokens(model, inputs)
        logits = compressed_logits(model, inputs, tokens[:, :-1])
    assert logits.argmax(-1).tolist() == tokens.tolist()


@pytest.mark.parametrize("case", CORE)
def test_beam_search_with_one_beam_per_sample_kept(model: Any, inputs: Any, case: str) -> None:
    """Beam search over a batch gives each sample what it gets alone."""
    method, options = ALL[case]
    beams = {"num_beams": 3, "num_return_sequences": 1}
    with tokprune.compress(model, method, **options):
        together = new_tokens(model, inputs, **beams)
        alone = [new_tokens(model, single(inputs, i, slice(i, i + 1)), **beams) for i in range(3)]
    assert together.tolist() == torch.cat(alone).tolist()


def test_beams_are_reordered_with_their_book_keeping(model: Any, inputs: Any) -> None:
    """The score that beam search reports is the score of its own sequence, run step by step."""
    from tokprune.testing.oracle import compressed_logits

    one = single(inputs, 0, slice(0, 1))
    with tokprune.compress(model, "fastv", keep=7), torch.no_grad():
        out = model.generate(
            **one, **GREEDY, num_beams=4, length_penalty=0.0, return_dict_in_generate=True,
            output_scores=True,
        )  # fmt: skip
        tokens = out.sequences[:, one["input_ids"].shape[1] :]
        logits = compressed_logits(model, one, tokens[:, :-1])
    score = logits.log_softmax(-1).gather(2, tokens[:, :, None]).sum()
    assert out.sequences_scores[0].item() == pytest.approx(score.item(), abs=1e-3)


def test_sampling_is_seeded_by_torch_alone(model: Any, inputs: Any) -> None:
    def run() -> list[list[int]]:
        torch.manual_seed(5)
        return new_tokens(model, inputs, do_sample=True, temperature=1.0).tolist()

    with tokprune.compress(model, "random", keep=10, seed=3):
        first, second = run(), run()
    assert first == second
    assert first != new_tokens(model, inputs).tolist()


@pytest.mark.parametrize("case", CORE)
def test_second_chat_turn_on_the_same_cache(model: Any, case: str) -> None:
    """Turn two on the cache equals the same tokens fed one by one."""
    method, options = ALL[case]
    inputs = make_inputs(model, PROMPTS[:1], SIZES[:1])
    turn = torch.randint(3, 98, (1, 5), generator=torch.Generator().manual_seed(3))
    with tokprune.compress(model, method, **options), torch.no_grad():
        first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        cache = first.past_key_values
        stepwise = copy.deepcopy(cache)
        ids = torch.cat([first.sequences, turn], dim=1)
        second = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache,
            **GREEDY, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        rest = torch.cat([first.sequences[:, -1:], turn], dim=1)
        start = first.sequences.shape[1] - 1
        for i in range(rest.shape[1]):
            out = model(
                input_ids=rest[:, i : i + 1],
                attention_mask=torch.ones(1, start + i + 1, dtype=torch.long),
                position_ids=torch.tensor([[start + i]]),
                past_key_values=stepwise,
                use_cache=True,
            )
    torch.testing.assert_close(second.logits[0], out.logits[:, -1], rtol=1e-4, atol=1e-5)
    assert second.sequences.shape[1] == ids.shape[1] + NEW


def test_padded_second_turn_of_a_batch(model: Any) -> None:
    """A later turn whose texts differ in length (padding in the middle) equals single runs."""
    inputs = make_inputs(model, PROMPTS[:2], SIZES[:2])
    turns = [torch.tensor([[11, 12, 13, 14]]), torch.tensor([[21, 22]])]
    with tokprune.compress(model, "fastv", keep=7), torch.no_grad():
        out = model(**inputs, position_ids=(inputs["attention_mask"].cumsum(1) - 1).clamp(min=0))
        ids = torch.tensor([[11, 12, 13, 14], [0, 0, 21, 22]])
        new_mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
        mask = torch.cat([inputs["attention_mask"], new_mask], dim=1)
        position = (mask.cumsum(1) - 1).clamp(min=0)[:, -4:]
        got = model(
            input_ids=ids, attention_mask=mask, position_ids=position,
            past_key_values=out.past_key_values,
        ).logits[:, -1]  # fmt: skip
        want = []
        for i in range(2):
            one = single(inputs, i, slice(i, i + 1))
            out = model(**one)
            n = one["input_ids"].shape[1]
            t = turns[i]
            want.append(
                model(
                    input_ids=t,
                    attention_mask=torch.ones(1, n + t.shape[1], dtype=torch.long),
                    position_ids=torch.arange(n, n + t.shape[1])[None],
                    past_key_values=out.past_key_values,
                ).logits[:, -1]
            )
    torch.testing.assert_close(got, torch.cat(want), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["fastv", "random"])
def test_new_image_in_a_later_turn(model: Any, method: str) -> None:
    """A second turn with its own image on a compressed cache: every layer holds both images'
    survivors, and later tokens continue each layer's numbering."""
    inputs = make_inputs(model, PROMPTS[:1], SIZES[:1])
    more = make_inputs(model, [[3, "image", 4]], SIZES[1:2], seed=9)
    keep = 7
    with tokprune.compress(model, method, keep=keep), torch.no_grad():
        out = model(**inputs)
        past = inputs["input_ids"].shape[1]
        mask = torch.ones(1, past + more["input_ids"].shape[1], dtype=torch.long)
        out = model(**{**more, "attention_mask": mask}, past_key_values=out.past_key_values)
        cache = out.past_key_values
        assert cache.get_seq_length() == mask.shape[1]
        last = cache.layers[-1]
        assert isinstance(last, CompressedLayer)
        assert last.entries == 2 * keep + 4 + 6 + 3 + 4
        step = model(
            input_ids=torch.tensor([[7]]),
            attention_mask=torch.ones(1, mask.shape[1] + 1, dtype=torch.long),
            position_ids=torch.tensor([[mask.shape[1]]]),
            past_key_values=cache,
        )
    assert torch.isfinite(step.logits).all()


@pytest.mark.parametrize("case", CORE)
def test_several_images_per_prompt(model: Any, case: str) -> None:
    """Prompts with two, none and one image in one batch equal single runs."""
    method, options = ALL[case]
    prompts: list[list[Any]] = [[4, "image", 2, "image", 6], [9], [3, "image", 5]]
    inputs = make_inputs(model, prompts, SIZES)
    slices = [slice(0, 2), slice(2, 2), slice(2, 3)]
    with tokprune.compress(model, method, **options) as trace:
        together = new_tokens(model, inputs)
        counts = trace.last.layers[-1].counts
        alone = [new_tokens(model, single(inputs, i, s)) for i, s in enumerate(slices)]
    assert together.tolist() == torch.cat(alone).tolist()
    assert [len(c) for c in counts] == [2, 0, 1]


@pytest.mark.parametrize("case", CORE)
def test_text_only_prompt_passes_through(model: Any, case: str) -> None:
    method, options = ALL[case]
    inputs = make_inputs(model, [[9], [4]])
    with torch.no_grad():
        want = model(**inputs).logits
        with tokprune.compress(model, method, **options) as trace:
            got = model(**inputs).logits
            tokens = new_tokens(model, inputs)
    assert torch.equal(got, want)
    assert trace.last is None
    assert tokens.tolist() == new_tokens(model, inputs).tolist()


@pytest.mark.parametrize("case", CORE)
def test_two_generations_interleaved(model: Any, case: str) -> None:
    """Two conversations stepped in turns on one model give what each gives alone."""
    method, options = ALL[case]
    a, b = make_inputs(model, PROMPTS[:1], SIZES[:1]), make_inputs(model, PROMPTS[1:2], SIZES[1:2])

    def prefill(inputs: Any) -> dict[str, Any]:
        out = model(**inputs, use_cache=True)
        return {"cache": out.past_key_values, "n": inputs["input_ids"].shape[1], "out": out}

    def step(state: dict[str, Any]) -> int:
        token = state["out"].logits[:, -1].argmax(-1, keepdim=True)
        state["out"] = model(
            input_ids=token,
            attention_mask=torch.ones(1, state["n"] + 1, dtype=torch.long),
            position_ids=torch.tensor([[state["n"]]]),
            past_key_values=state["cache"],
        )
        state["n"] += 1
        return int(token)

    with tokprune.compress(model, method, **options), torch.no_grad():
        first, second = prefill(a), prefill(b)
        mixed = [(step(first), step(second)) for _ in range(NEW)]
        alone = new_tokens(model, a)[0].tolist(), new_tokens(model, b)[0].tolist()
    assert [m[0] for m in mixed] == alone[0]
    assert [m[1] for m in mixed] == alone[1]


@pytest.mark.parametrize("case", CORE)
def test_without_a_cache_every_step_selects_anew(model: Any, inputs: Any, case: str) -> None:
    """use_cache=False runs (each step is a prefill of a longer prompt) and agrees on the first
    token, which both modes take from the same prefill."""
    method, options = ALL[case]
    with tokprune.compress(model, method, **options):
        # a generated image token would count as a placeholder in the next, longer prompt
        quiet = {"suppress_tokens": [IMAGE_TOKEN]}
        cached = new_tokens(model, inputs, max_new_tokens=1, **quiet)
        uncached = new_tokens(model, inputs, max_new_tokens=3, use_cache=False, **quiet)
    assert cached[:, 0].tolist() == uncached[:, 0].tolist()


def test_threads_share_a_patched_model(model: Any) -> None:
    """Two threads on one patched model get what each gets alone."""
    from concurrent.futures import ThreadPoolExecutor

    batches = [make_inputs(model, PROMPTS[i : i + 1], SIZES[i : i + 1]) for i in range(2)]
    with tokprune.compress(model, "fastv", keep=7):
        alone = [new_tokens(model, b).tolist() for b in batches]
        with ThreadPoolExecutor(2) as pool:
            for _ in range(5):
                together = list(pool.map(lambda b: new_tokens(model, b).tolist(), batches))
                assert together == alone


def test_user_supplied_cache_is_used(model: Any, inputs: Any) -> None:
    cache = DynamicCache()
    with tokprune.compress(model, "fastv", keep=7), torch.no_grad():
        model.generate(**inputs, **GREEDY, past_key_values=cache)
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] + NEW - 1
    assert cache.layers[-1].entries < cache.layers[0].get_seq_length()


def test_compressed_cache_needs_its_patch(model: Any) -> None:
    inputs = make_inputs(model, PROMPTS[:1], SIZES[:1])
    with tokprune.compress(model, "random", keep=4), torch.no_grad():
        cache = model(**inputs).past_key_values
    with pytest.raises(RuntimeError, match="past_key_values was compressed"), torch.no_grad():
        model(
            input_ids=torch.tensor([[5]]),
            attention_mask=torch.ones(1, inputs["input_ids"].shape[1] + 1, dtype=torch.long),
            past_key_values=cache,
        )


def test_inference_mode(model: Any, inputs: Any) -> None:
    with tokprune.compress(model, "fastv", keep=7):
        with torch.inference_mode():
            inside = model.generate(**inputs, **GREEDY)
        with torch.no_grad():
            outside = model.generate(**inputs, **GREEDY)
    assert inside.tolist() == outside.tolist()


def test_right_padding_scores_the_last_real_token(model: Any) -> None:
    """A right-padded batch comes back right-aligned: the last logits are those of the last real
    token of every row."""
    inputs = make_inputs(model, PROMPTS, SIZES, pad_side="right")
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with tokprune.compress(model, "fastv", keep=7), torch.no_grad():
        got = model(**inputs, position_ids=positions).logits[:, -1]
        want = torch.cat(
            [model(**single(inputs, i, slice(i, i + 1))).logits[:, -1] for i in range(3)]
        )
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
