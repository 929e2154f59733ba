"""The double of flash_attn: against loops, and under genuine models of transformers."""

import importlib.metadata
import importlib.util
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from flash_double import (
    VERSION,
    FlashCall,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_double,
    install_flash_double,
    pad_input,
    uninstall_flash_double,
    unpad_input,
)
from tiny import llava, llava_next, make_inputs, single
from torch import Tensor
from transformers import modeling_flash_attention_utils as flash_utils
from transformers.utils import import_utils, is_flash_attn_2_available

FLASH = "flash_attention_2"
CLOSE = {"atol": 2e-4, "rtol": 1e-4}

# ------------------------------------------------------------------------------- the functions


def tensors(queries: int, keys: int, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, queries, 4, 8], k and v [B, keys, 2, 8], float64."""
    generator = torch.Generator().manual_seed(100 * queries + keys)
    shapes = [(batch, queries, 4, 8), (batch, keys, 2, 8), (batch, keys, 2, 8)]
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return q, k, v


def by_loops(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: tuple[int, int], softcap: float,
    scale: float,
) -> Tensor:  # fmt: skip
    """What one row of a batch gives, one query and one head at a time."""
    queries, heads, keys = q.shape[0], q.shape[1], k.shape[0]
    out = torch.zeros_like(q)
    for i in range(queries):
        place = i + keys - queries  # of this query among the keys
        for h in range(heads):
            g = h * k.shape[1] // heads
            weights: dict[int, float] = {}
            for j in range(keys):
                if causal and j > place:
                    continue
                if window[0] != -1 and j < place - window[0]:
                    continue
                if not causal and window[1] != -1 and j > place + window[1]:
                    continue
                score = float(q[i, h] @ k[j, g]) * scale
                weights[j] = math.exp(softcap * math.tanh(score / softcap) if softcap else score)
            for j, weight in weights.items():
                out[i, h] += weight / sum(weights.values()) * v[j, g]
    return out


@pytest.mark.parametrize("window", [(-1, -1), (2, 2), (0, 1), (3, -1), (-1, 1), (0, 0)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(5, 5), (2, 6), (6, 2), (1, 5), (3, 1)], ids=str)
def test_functions_are_what_the_loops_give(
    lengths: tuple[int, int], causal: bool, window: tuple[int, int]
) -> None:
    q, k, v = tensors(*lengths)
    for softcap, scale in [(0.0, None), (1.5, 0.7)]:
        options = {
            "causal": causal, "window_size": window, "softcap": softcap, "softmax_scale": scale,
        }  # fmt: skip
        expected = torch.stack([
            by_loops(*row, causal, window, softcap, scale or 8**-0.5) for row in zip(q, k, v)
        ])  # fmt: skip
        torch.testing.assert_close(flash_attn_func(q, k, v, **options), expected)
        # the same rows one behind another, an empty sequence between them
        starts_q = torch.tensor([0, lengths[0], lengths[0], 2 * lengths[0]], dtype=torch.int32)
        starts_k = torch.tensor([0, lengths[1], lengths[1], 2 * lengths[1]], dtype=torch.int32)
        packed = flash_attn_varlen_func(
            q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), starts_q, starts_k, *lengths,
            **options,
        )  # fmt: skip
        torch.testing.assert_close(packed, expected.flatten(0, 1))


def test_sequences_of_different_lengths() -> None:
    q, k, v = (x[0] for x in tensors(7, 9, batch=1))
    lengths_q, lengths_k = [3, 0, 4], [5, 2, 2]
    starts = [
        torch.tensor([0, *torch.tensor(n).cumsum(0)], dtype=torch.int32)
        for n in (lengths_q, lengths_k)
    ]
    out = flash_attn_varlen_func(q, k, v, *starts, 4, 5, causal=True, window_size=(2, 2))
    parts = [x.split(n) for x, n in ((q, lengths_q), (k, lengths_k), (v, lengths_k))]
    expected = [by_loops(*part, True, (2, 2), 0, 8**-0.5) for part in zip(*parts)]
    torch.testing.assert_close(out, torch.cat(expected))


def test_queries_without_visible_keys_give_zeros_and_finite_gradients() -> None:
    q, k, v = (x.requires_grad_() for x in tensors(5, 2))
    out = flash_attn_func(q, k, v, causal=True)
    assert not out[:, :3].any()
    assert (out[:, 3:] != 0).all()
    out.sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v))
    q, k, v = tensors(3, 0)
    assert not flash_attn_func(q, k, v).any()


def test_half_precision_is_answered_in_kind() -> None:
    q, k, v = (x.bfloat16() for x in tensors(4, 4))
    out = flash_attn_func(q, k, v, causal=True)
    assert out.dtype == torch.bfloat16
    exact = flash_attn_func(q.double(), k.double(), v.double(), causal=True)
    torch.testing.assert_close(out.double(), exact, atol=2e-2, rtol=2e-2)


def test_queries_of_no_sequence_are_nan() -> None:
    q, k, v = (x[0] for x in tensors(5, 5, batch=1))
    starts = torch.tensor([1, 4], dtype=torch.int32)
    out = flash_attn_varlen_func(q, k, v, starts, starts, 3, 3)
    assert out.isnan().all(-1).all(-1).tolist() == [True, False, False, False, True]


def test_what_the_package_would_not_take_is_refused() -> None:
    q, k, v = tensors(4, 4)
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    starts = torch.tensor([0, 4, 8], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="dropout_p"):
        flash_attn_func(q, k, v, 0.1)
    with pytest.raises(NotImplementedError, match="block_table"):
        flash_attn_varlen_func(*flat, starts, starts, 4, 4, block_table=starts)
    with pytest.raises(RuntimeError, match="dtype"):
        flash_attn_func(q, k.float(), v)
    with pytest.raises(RuntimeError, match="heads"):
        flash_attn_func(q[:, :, :3], k, v)
    with pytest.raises(RuntimeError, match="dimensions"):
        flash_attn_func(*flat)
    with pytest.raises(RuntimeError, match="int32"):
        flash_attn_varlen_func(*flat, starts.long(), starts, 4, 4)
    with pytest.raises(RuntimeError, match="length"):
        flash_attn_varlen_func(*flat, starts, starts[:2], 4, 8)
    with pytest.raises(ValueError, match="max_seqlen_k=3"):
        flash_attn_varlen_func(*flat, starts, starts, 4, 3)
    with pytest.raises(ValueError, match="rise"):
        flash_attn_varlen_func(*flat, starts, starts + 1, 4, 4)


def test_unpadding_and_padding_again() -> None:
    hidden = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 0, 1]])
    tokens, indices, starts, longest, used = unpad_input(hidden, mask)
    assert indices.tolist() == [1, 2, 4, 5, 7]
    assert starts.tolist() == [0, 2, 5]
    assert starts.dtype == torch.int32
    assert (longest, used.tolist()) == (3, [2, 3])
    assert torch.equal(pad_input(tokens, indices, 2, 4), hidden * mask[..., None])
    more = unpad_input(hidden, mask, torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0]]))
    assert more[2].tolist() == [0, 3, 6]
    assert more[4].tolist() == [2, 3]


# ------------------------------------------------------------------------------- installation


def traces() -> list[Any]:
    """All that the double may change, as it is now."""
    names = [n for n in vars(flash_utils) if "_fn" in n or n == "_loaded_implementation"]
    matrix = getattr(flash_utils, "FLASH_ATTENTION_COMPATIBILITY_MATRIX", {})
    dispatch = [vars(transformers.PreTrainedModel).get("_flash_attn_2_can_dispatch")]
    return [
        {n: m for n, m in sys.modules.items() if n.startswith("flash_attn")},
        list(sys.meta_path),
        {name: vars(flash_utils)[name] for name in names},
        dict(matrix.get(2, {})),
        dispatch,
        importlib.util.find_spec("flash_attn"),
        [flash_utils.is_flash_attn_2_available, import_utils.is_flash_attn_2_available],
        [import_utils.is_flash_attn_2_available(), flash_utils.is_flash_attn_available()],
        import_utils.is_flash_attn_greater_or_equal("2.3.3"),
        "flash_attn" in importlib.metadata.packages_distributions(),
    ]


def test_it_is_found_while_it_is_installed_and_gone_after() -> None:
    before = traces()
    with flash_double():
        assert importlib.util.find_spec("flash_attn") is not None
        assert importlib.metadata.version("flash_attn") == VERSION
        assert importlib.metadata.version("flash-attn") == VERSION
        assert flash_utils.is_flash_attn_2_available()
        assert import_utils.is_flash_attn_2_available()
        assert import_utils.is_flash_attn_greater_or_equal("2.3.3")
        assert not import_utils.is_flash_attn_greater_or_equal("9.0")
        assert not flash_utils.flash_attn_supports_top_left_mask()
        assert not import_utils.is_flash_attn_3_available()
        llava(attention=FLASH)
    assert traces() == before
    if not is_flash_attn_2_available():
        with pytest.raises(ImportError):
            llava(attention=FLASH)


def test_it_is_gone_after_an_error_too() -> None:
    before = traces()
    with pytest.raises(KeyError), flash_double():
        raise KeyError
    assert traces() == before


def test_uses_nest_and_mix() -> None:
    before = traces()
    q, k, v = tensors(2, 2)
    install_flash_double()
    try:
        with flash_double() as outer:
            flash_attn_func(q, k, v)
            with flash_double() as inner:
                flash_attn_func(q, k, v, causal=True)
            assert inner == outer[1:]
            assert [call.causal for call in outer] == [False, True]
        assert import_utils.is_flash_attn_2_available()
    finally:
        uninstall_flash_double()
    assert traces() == before
    with pytest.raises(RuntimeError, match="not installed"):
        uninstall_flash_double()


class Refusing(transformers.LlamaForCausalLM):
    _supports_flash_attn = False


def test_models_that_do_not_support_it_still_refuse() -> None:
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=10,
    )  # fmt: skip
    config._attn_implementation = FLASH
    with flash_double(), pytest.raises(ValueError, match="does not support Flash Attention"):
        Refusing(config)


def test_models_are_loaded_with_it_and_switched_to_it(tmp_path: Path) -> None:
    plain = llava(layers=2, vision_layers=2)
    plain.save_pretrained(tmp_path)
    inputs = make_inputs(plain, [[4, "image", 6]])
    with torch.no_grad(), flash_double() as calls:
        expected = plain(**inputs).logits
        assert not calls
        loaded = type(plain).from_pretrained(tmp_path, attn_implementation=FLASH)
        torch.testing.assert_close(loaded(**inputs).logits, expected, **CLOSE)
        # two decoder layers, and the tower up to the layer that is read or to its end
        assert [call.causal for call in calls].count(True) == 2
        assert [call.causal for call in calls].count(False) in (1, 2)
        calls.clear()
        plain.set_attn_implementation(FLASH)
        torch.testing.assert_close(plain(**inputs).logits, expected, **CLOSE)
        assert calls


# ------------------------------------------------------------------------------- models

BUILDS: dict[str, Callable[..., Any]] = {
    "llava": llava,
    "mistral": lambda **options: llava(decoder="mistral", sliding_window=8, **options),
    "llava_next": llava_next,
    "qwen2": lambda **options: llava(decoder="qwen2", **options),
    "qwen2-sliding": lambda **options: llava(
        decoder="qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=0, **options
    ),
}
PROMPTS = [[4, "image", 6], [11, "image", 3], [5]]


@pytest.fixture(scope="module")
def models() -> Iterator[dict[str, tuple[Any, Any]]]:
    """(under sdpa, under flash) by name, the same weights."""
    with flash_double():
        yield {
            name: tuple(build(layers=4, vision_layers=3, attention=a) for a in ("sdpa", FLASH))
            for name, build in BUILDS.items()
        }


@pytest.fixture(params=BUILDS)
def pair(request: pytest.FixtureRequest, models: dict[str, Any]) -> tuple[Any, Any]:
    return models[request.param]


def window_of(model: Any, layer: int) -> int | None:
    """The sliding window of a layer of the decoder."""
    config = model.config.text_config
    kinds = getattr(config, "layer_types", None)
    sliding = kinds is None or kinds[layer] == "sliding_attention"
    return config.sliding_window if sliding and hasattr(config, "sliding_window") else None


def decoder_calls(calls: list[FlashCall]) -> list[FlashCall]:
    return [call for call in calls if call.causal]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches(pair: tuple[Any, Any], side: str) -> None:
    plain, flash = pair
    inputs = make_inputs(plain, PROMPTS, pad_side=side)
    with torch.no_grad(), flash_double() as calls:
        expected, out = plain(**inputs).logits, flash(**inputs).logits
    real = inputs["attention_mask"] != 0
    torch.testing.assert_close(out[real], expected[real], **CLOSE)
    tower, decoder = [c for c in calls if not c.causal], decoder_calls(calls)
    assert tower
    assert not any(call.packed for call in tower)
    starts = (0, *real.sum(1).cumsum(0).tolist())
    assert len(decoder) == 4
    for layer, call in enumerate(decoder):
        assert call.packed
        assert call.cu_seqlens_q == call.cu_seqlens_k == starts
        assert call.max_seqlen_q == call.max_seqlen_k == real.sum(1).max()
        assert call.key[1] == 2  # heads of keys: not repeated
        window = window_of(flash, layer)
        assert call.window == ((-1, -1) if window is None else (window - 1, window - 1))


def test_a_prompt_alone_with_no_mask_and_with_ones(pair: tuple[Any, Any]) -> None:
    plain, flash = pair
    inputs = make_inputs(plain, [[4, "image", 6]])
    bare = {name: x for name, x in inputs.items() if name != "attention_mask"}
    with torch.no_grad(), flash_double() as calls:
        expected = plain(**bare).logits
        torch.testing.assert_close(flash(**bare).logits, expected, **CLOSE)
        torch.testing.assert_close(flash(**inputs).logits, expected, **CLOSE)
    assert len(decoder_calls(calls)) == 8
    assert not any(call.packed for call in calls)  # a mask of ones is no mask


@pytest.mark.parametrize("prompts", [PROMPTS, [[4, "image", 6]]], ids=["batch", "alone"])
def test_generation(pair: tuple[Any, Any], prompts: list[list[Any]]) -> None:
    plain, flash = pair
    inputs = make_inputs(plain, prompts)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    with flash_double() as calls:
        expected, out = plain.generate(**inputs, **options), flash.generate(**inputs, **options)
    assert torch.equal(out, expected)
    decoder = decoder_calls(calls)
    assert len(decoder) == 12 * 4
    assert {call.packed for call in decoder[:4]} == {len(prompts) > 1}
    mask = inputs["attention_mask"]
    for n, call in enumerate(decoder[4:]):  # one query a row, and the keys before it
        seen = torch.nn.functional.pad(mask, (0, 1 + n // 4), value=1)
        window = window_of(flash, n % 4)
        if window is not None:
            seen = seen[:, -window:]
        if seen.all():  # padding that has slid out of sight is forgotten
            assert not call.packed
            assert (call.query[1], call.key[1]) == (1, seen.shape[1])
        else:
            assert call.cu_seqlens_q == tuple(range(len(prompts) + 1))
            assert call.cu_seqlens_k == (0, *seen.sum(1).cumsum(0).tolist())
        assert call.window == (-1, -1)  # the cache of a sliding layer holds no more than it sees


@pytest.mark.parametrize("prompts", [PROMPTS, [[4, "image", 6]]], ids=["batch", "alone"])
def test_a_second_turn_on_the_cache(pair: tuple[Any, Any], prompts: list[list[Any]]) -> None:
    plain, flash = pair
    inputs = make_inputs(plain, prompts)
    batch = len(prompts)
    turn = torch.randint(3, 98, (batch, 5), generator=torch.Generator().manual_seed(3))
    new = torch.ones(batch, 5, dtype=torch.long)
    padded = batch > 1 and window_of(flash, 0) is None  # the second turn is padded, too
    if padded:
        new[0, :2] = 0
    mask = torch.cat([inputs["attention_mask"], new], 1)
    answers = []
    with torch.no_grad(), flash_double() as calls:
        for model in pair:
            cache = model(**inputs, use_cache=True).past_key_values
            calls.clear()
            out = model(input_ids=turn, attention_mask=mask, past_key_values=cache)
            answers.append(out.logits[new != 0])
    torch.testing.assert_close(answers[1], answers[0], **CLOSE)
    for layer, call in enumerate(calls):
        window = window_of(flash, layer)
        assert call.window == ((-1, -1) if window is None else (window - 1, window - 1))
        assert call.packed == (batch > 1)
        if batch > 1:
            assert call.cu_seqlens_q == ((0, 3, 8, 13) if padded else (0, 5, 10, 15))
            if window is None:
                assert call.cu_seqlens_k == (0, *mask.sum(1).cumsum(0).tolist())
        else:
            assert call.query[1] == 5
            assert call.key[1] == (mask.shape[1] if window is None else window - 1 + 5)


def test_rows_of_a_batch_are_what_they_are_alone(pair: tuple[Any, Any]) -> None:
    _, flash = pair
    inputs = make_inputs(flash, PROMPTS)
    with torch.no_grad(), flash_double():
        together = flash(**inputs).logits
        for row, images in enumerate([slice(0, 1), slice(1, 2), slice(0, 0)]):
            alone = flash(**single(inputs, row, images)).logits[0]
            real = inputs["attention_mask"][row] != 0
            torch.testing.assert_close(together[row, real], alone, **CLOSE)


def test_zeros_anywhere_in_the_mask(models: dict[str, Any]) -> None:
    """Not left only: in the middle and on the right; in a prompt, a turn and a step."""
    pair = models["llava"]
    mask = torch.tensor([[0, 1, 1, 0, 0, 1, 1, 1, 1], [1, 1, 0, 1, 1, 0, 1, 0, 0]])
    ids = torch.randint(3, 98, (2, 13), generator=torch.Generator().manual_seed(5))
    turn = torch.tensor([[1, 0, 1], [0, 1, 0]])
    step = torch.ones(2, 1, dtype=torch.long)
    answers = []
    with torch.no_grad(), flash_double():
        for model in pair:
            out = model(input_ids=ids[:, :9], attention_mask=mask, use_cache=True)
            logits = [out.logits[mask != 0]]
            seen = torch.cat([mask, turn], 1)
            out = model(
                input_ids=ids[:, 9:12], attention_mask=seen, past_key_values=out.past_key_values
            )
            logits.append(out.logits[turn != 0])
            seen = torch.cat([seen, step], 1)
            out = model(
                input_ids=ids[:, 12:], attention_mask=seen, past_key_values=out.past_key_values
            )
            answers.append(torch.cat([*logits, out.logits[:, 0]]))
    torch.testing.assert_close(answers[1], answers[0], **CLOSE)


def test_sliding_windows_count_real_tokens_only(models: dict[str, Any]) -> None:
    """Unlike those of sdpa, which count places: zeros in the middle are as if not there."""
    plain, flash = models["mistral"]
    ids = torch.randint(3, 98, (1, 20), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[0, 9:12] = 0
    real = mask[0] != 0
    places = torch.arange(20)[None, real]
    with torch.no_grad(), flash_double():
        out = flash(input_ids=ids, attention_mask=mask).logits[:, real]
        without = flash(input_ids=ids[:, real], position_ids=places).logits
        other = plain(input_ids=ids, attention_mask=mask).logits[:, real]
    torch.testing.assert_close(out, without, **CLOSE)
    torch.testing.assert_close(out[:, :9], other[:, :9], **CLOSE)
    assert not torch.allclose(out[:, 9:], other[:, 9:], **CLOSE)


def test_a_static_cache_is_cut_to_the_mask(models: dict[str, Any]) -> None:
    plain, flash = models["llava"]
    inputs = make_inputs(plain, [[9], [5]])
    options = {
        "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "disable_compile": True,
        "cache_implementation": "static",
    }  # fmt: skip
    with flash_double() as calls:
        expected, out = plain.generate(**inputs, **options), flash.generate(**inputs, **options)
    assert torch.equal(out, expected)
    assert [call.cu_seqlens_k for call in calls[::4]] == [
        (0, 9 + step, 14 + 2 * step) for step in range(6)
    ]


def test_prompts_packed_by_their_positions(models: dict[str, Any]) -> None:
    """Several prompts in one row, told apart by position ids that start anew."""
    for name in ("llava", "mistral"):
        flash = models[name][1]
        ids = torch.randint(3, 98, (1, 22), generator=torch.Generator().manual_seed(2))
        positions = torch.cat([torch.arange(10), torch.arange(12)])[None]
        with torch.no_grad(), flash_double() as calls:
            out = flash(input_ids=ids, position_ids=positions, use_cache=False).logits
            assert {call.cu_seqlens_q for call in calls} == {(0, 10, 22)}
            assert {call.cu_seqlens_k for call in calls} == {(0, 10, 22)}
            assert {call.max_seqlen_q for call in calls} == {12}
            parts = [flash(input_ids=x).logits for x in (ids[:, :10], ids[:, 10:])]
        torch.testing.assert_close(out, torch.cat(parts, 1), **CLOSE)


def test_soft_caps_and_windows_of_gemma_2() -> None:
    config = transformers.Gemma2Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size=50, sliding_window=6, query_pre_attn_scalar=8,
        attn_logit_softcapping=1.5, initializer_range=0.5, pad_token_id=0,
    )  # fmt: skip
    answers = []
    mask = torch.ones(2, 15, dtype=torch.long)
    mask[0, :4] = 0
    ids = torch.randint(3, 50, (2, 15), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), flash_double() as calls:
        for attention in ("eager", FLASH):
            config._attn_implementation = attention
            torch.manual_seed(0)
            model = transformers.Gemma2ForCausalLM(config).eval()
            answers.append(model(input_ids=ids, attention_mask=mask).logits[mask != 0])
    torch.testing.assert_close(answers[1], answers[0], **CLOSE)
    assert [call.window for call in calls] == [(5, 5), (-1, -1)]
    assert {call.softcap for call in calls} == {1.5}
