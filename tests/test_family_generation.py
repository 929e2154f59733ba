"""Ways to generate with M-RoPE (Qwen2.5-VL, Qwen3-VL), and LLaVA-1.5 as control: beams, samples,
streams, prefix caches, loops by hand, chat turns with new images, prompts of text alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from family_cases import SHAPES, case_of
from torch import Tensor

import tokprune
from tokprune.engine.cache import CompressedLayer, cache_argument
from tokprune.methods import make_method
from tokprune.testing import Case, assert_same_logits, continuation_tokens, tiny_family
from tokprune.testing.case import dropped, last_of
from tokprune.testing.checks.numbers import equals_oracle
from tokprune.testing.generated import forced_logits, generated_oracle, with_turn
from tokprune.testing.grid_prompts import TYPED
from tokprune.testing.numbering import later_positions, prompt_positions

NEW = 5
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
METHODS = {
    "random": {"keep": 5},
    "divprune": {"keep": 5},
    "fastv": {"keep": 4, "prune_before": 2},
    "pyramiddrop": {"keep": 3, "prune_before": (1, 3)},
    "sparsevlm": {"keep": 4, "prune_before": (2, 4)},
}


@pytest.fixture(params=["llava-1.5", "qwen2.5-vl", "qwen3-vl"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=METHODS)
def case(request: pytest.FixtureRequest, family: str) -> Case:
    method = make_method(request.param, **METHODS[request.param])
    return case_of(method, family, SHAPES["ragged"])


def answers(model: Any, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    with torch.no_grad():
        out = model.generate(**inputs, **{**GREEDY, **options})
    return out[:, inputs["input_ids"].shape[1] :]


def test_beams_are_what_each_row_gets_alone(case: Case) -> None:
    inputs = case.inputs()
    beams = {"num_beams": 3}
    with case.compress():
        together = answers(case.model, inputs, **beams)
        alone = [answers(case.model, case.row(inputs, row), **beams) for row in range(4)]
    assert together.tolist() == torch.cat(alone).tolist()


def test_the_score_of_a_beam_is_that_of_its_own_sequence(case: Case) -> None:
    """Reordered with their caches: a beam's score is that of its tokens, forced one by one."""
    one = case.having(prompts=SHAPES["single"])
    inputs = one.inputs()
    with case.compress(), torch.no_grad():
        out = case.model.generate(
            **inputs, **GREEDY, num_beams=4, num_return_sequences=3, length_penalty=0.0,
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        tokens = out.sequences[:, inputs["input_ids"].shape[1] :]
        for beam, score in zip(tokens, out.sequences_scores):
            logits = forced_logits(case.model, inputs, beam[None, :-1]).log_softmax(-1)
            own = logits.gather(2, beam[None, :, None]).sum()
            assert own.item() == pytest.approx(score.item(), abs=1e-3)


def test_samples_of_a_prompt_share_its_images(case: Case) -> None:
    """``num_return_sequences``: every sample is one of the compressed model's, and seeded by torch
    alone."""
    # transformers 4 repeats pixels image by image, so that samples of two images mix them up
    inputs = case.having(prompts=SHAPES["two" if TYPED else "single"]).inputs()
    start = inputs["input_ids"].shape[1]
    options = {**GREEDY, "do_sample": True, "num_return_sequences": 4}

    def run() -> Any:
        torch.manual_seed(5)
        with torch.no_grad():
            return case.model.generate(
                **inputs, **options, return_dict_in_generate=True, output_logits=True
            )

    with case.compress() as trace:
        out, again = run(), run()
        assert dropped(last_of(trace))
        tokens = out.sequences[:, start:]
        assert again.sequences.tolist() == out.sequences.tolist()
        assert len({tuple(row) for row in tokens.tolist()}) > 1
        logits = torch.stack(out.logits, dim=1)
        for sample, own in zip(tokens, logits):
            want = forced_logits(case.model, inputs, sample[None, :-1])
            assert_same_logits(own[None], want)


def test_a_stream_is_what_generate_returns(case: Case) -> None:
    class Collect(transformers.generation.streamers.BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    inputs = case.having(prompts=SHAPES["single"]).inputs()
    collected = Collect()
    with case.compress():
        plain = answers(case.model, inputs)
        streamed = answers(case.model, inputs, streamer=collected)
    assert streamed.tolist() == plain.tolist()
    assert collected.tokens == [*inputs["input_ids"][0].tolist(), *plain[0].tolist(), -1]


def _cut(inputs: dict[str, Tensor], start: int) -> dict[str, Tensor]:
    """The inputs of a system prompt that ends before column ``start``."""
    return {
        name: value[:, :start]
        for name, value in inputs.items()
        if name in ("input_ids", "attention_mask", "mm_token_type_ids")
    }


@pytest.mark.skipif(not TYPED, reason="generate() of transformers 4 drops pixels on a cache")
def test_a_prefix_cache_of_a_system_prompt(case: Case) -> None:
    """Text cached ahead, by the patched model, and then a prompt with an image that continues it:
    the answer is that without the cache, for every copy of it."""
    one = case.having(prompts=[[9, "image", 6]])
    with case.compress():
        first = one.inputs(seed=4)
        with torch.no_grad():
            cache = case.model(**_cut(first, 7), use_cache=True).past_key_values
        for seed in (4, 4):
            inputs = one.inputs(seed=seed)
            want = answers(case.model, inputs)
            own = {cache_argument(case.model): copy.deepcopy(cache)}
            assert answers(case.model, inputs, **own).tolist() == want.tolist()


def test_questions_on_copies_of_a_prefix_with_an_image(case: Case) -> None:
    """An image compressed once, several questions on copies of the cache: each the masked oracle's
    continuation of the very same prefill."""
    one = case.having(prompts=SHAPES["single"])
    inputs = one.inputs()
    model = case.model
    with case.compress() as trace, torch.no_grad():
        out = model.generate(**inputs, **{**GREEDY, "max_new_tokens": 1},
                             return_dict_in_generate=True)  # fmt: skip
        cache, prefill = out.past_key_values, last_of(trace)
        got = {}
        for seed, length in ((1, 3), (2, 6), (3, 1)):
            turn = torch.randint(3, 90, (1, length), generator=torch.Generator().manual_seed(seed))
            own = {cache_argument(model): copy.deepcopy(cache)}
            later = continuation_tokens(1, 2)
            got[seed] = turn, forced_logits(model, with_turn(inputs, turn), later, **own)
    if case.method.name == "sparsevlm":  # it merges: the oracle would need what was merged
        return
    for turn, logits in got.values():
        tokens = torch.cat([turn, continuation_tokens(1, 2)], dim=1)
        want = generated_oracle(model, inputs, prefill, tokens)
        assert_same_logits(logits, want[:, turn.shape[1] :])


@pytest.mark.parametrize("masked", [True, False], ids=["mask", "no mask"])
def test_a_loop_by_hand(case: Case, masked: bool) -> None:
    """With the mask and positions of every step given, or nothing but the token and the cache."""
    one = case.having(prompts=SHAPES["single"])
    inputs, model = one.inputs(), case.model
    with case.compress(), torch.no_grad():
        want = answers(model, inputs)[0].tolist()
        mask = inputs["attention_mask"]
        given = {**inputs, **prompt_positions(model, inputs)}
        if not masked:
            del given["attention_mask"]
        out = model(**given, use_cache=True)
        found = []
        for _ in range(NEW):
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            found.append(int(token))
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            step: dict[str, Any] = {cache_argument(model): out.past_key_values}
            numbers = later_positions(model, mask, 1)
            step |= {"attention_mask": mask, **numbers} if masked else numbers
            out = model(input_ids=token, **step, use_cache=True)
    assert found == want


@pytest.mark.parametrize("method", ["random", "fastv"])
def test_a_new_image_in_a_second_turn(family: str, method: str) -> None:
    """On a compressed cache: every layer holds the survivors of both turns, the image of the first
    is as it was left, and the steps after are those of the same tokens fed together."""
    made = make_method(method, **METHODS[method])
    case = case_of(made, family, [[4, "image", 6]])
    model, tiny = case.model, tiny_family(family)
    inputs = case.inputs()
    more = tiny.inputs(model, [[3, "image", 4]], [(32, 32)], seed=9)
    with case.compress() as trace, torch.no_grad():
        out = model(**inputs, **prompt_positions(model, inputs), use_cache=True)
        before = last_of(trace).layers[-1].lengths[0]
        past = inputs["input_ids"].shape[1]
        mask = torch.ones(1, past + more["input_ids"].shape[1], dtype=torch.long)
        given = {**more, "attention_mask": mask}
        numbers = _turn_positions(model, more, mask)
        out = model(**given, **numbers, **{cache_argument(model): out.past_key_values},
                    use_cache=True)  # fmt: skip
        after = last_of(trace)
        assert dropped(after)
        cache = out.past_key_values
        assert cache.get_seq_length() == mask.shape[1]
        last = cache.layers[-1]
        assert isinstance(last, CompressedLayer)
        assert last.entries == before + after.layers[-1].lengths[0]
        copied = copy.deepcopy(cache)
        tokens = continuation_tokens(1, 3)
        long = torch.nn.functional.pad(mask, (0, 3), value=1)
        start = _next_position(numbers)
        together = model(
            input_ids=tokens, attention_mask=long, **{cache_argument(model): copied},
            position_ids=start(0, 3), use_cache=True,
        ).logits  # fmt: skip
        rows = []
        for i in range(3):
            out = model(
                input_ids=tokens[:, i : i + 1], attention_mask=long[:, : mask.shape[1] + i + 1],
                position_ids=start(i, 1), **{cache_argument(model): cache}, use_cache=True,
            )  # fmt: skip
            cache = out.past_key_values
            rows.append(out.logits)
    assert_same_logits(together, torch.cat(rows, dim=1))


def _turn_positions(model: Any, more: dict[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
    """Positions of a later turn with an image: those of its own prompt, moved behind the first."""
    new = more["input_ids"].shape[1]
    first = later_positions(model, mask[:, : mask.shape[1] - new + 1], 1)["position_ids"]
    if first.dim() == 2:
        return {"position_ids": first + torch.arange(new)}
    own = {n: v for n, v in more.items() if not n.startswith("pixel")}
    position, _ = model.model.get_rope_index(**own)
    return {"position_ids": position + first}


def _next_position(numbers: dict[str, Tensor]) -> Any:
    position = numbers["position_ids"]
    first = int(position.max()) + 1

    def start(step: int, count: int) -> Tensor:
        flat = torch.arange(first + step, first + step + count)
        return flat.expand(*position.shape[:-1], -1)

    return start


def test_text_is_left_alone(case: Case) -> None:
    """Prompts of text alone are the unpatched model's to the bit, through ``generate`` too; a row
    of text in a batch with images is what it is alone."""
    text = case.having(prompts=[[9], [4], [7]])
    inputs, tokens = text.inputs(), continuation_tokens(3, 4)
    want = forced_logits(case.model, inputs, tokens)
    with case.compress() as trace:
        assert torch.equal(forced_logits(case.model, inputs, tokens), want)
        assert trace.last is None
        mixed = case.inputs()
        rows = forced_logits(case.model, mixed, continuation_tokens(4, 4))
        row = SHAPES["ragged"].index([5])
        alone = case.row(mixed, row)
        own = forced_logits(case.model, alone, continuation_tokens(4, 4)[row : row + 1])
        assert_same_logits(rows[row : row + 1], own)
    plain = forced_logits(case.model, alone, continuation_tokens(4, 4)[row : row + 1])
    assert torch.equal(own, plain)


def test_the_oracle_of_a_long_answer(case: Case) -> None:
    equals_oracle(case, steps=12)


def test_two_models_and_a_patch_each(family: str) -> None:
    """The deltas of M-RoPE are kept on the module: two conversations on two patched models do not
    meet."""
    models = [tiny_family(family).build(attention="sdpa", seed=seed) for seed in (0, 1)]
    cases = [
        Case(make_method("fastv", keep=4), tiny_family(family), model, SHAPES["ragged"])
        for model in models
    ]
    inputs = cases[0].inputs()
    alone = []
    for case in cases:
        with case.compress():
            alone.append(answers(case.model, inputs).tolist())
    with (
        tokprune.compress(models[0], cases[0].method),
        tokprune.compress(models[1], cases[1].method),
    ):
        both = [answers(case.model, inputs).tolist() for case in cases]
    assert both == alone
