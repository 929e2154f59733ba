"""The bench measures what it says, leaves the model alone, and compares equal lengths."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import methods_table
import pytest
import tiny
import tiny_processor
import torch
from rich.console import Console

import tokprune
from tokprune.api import is_patched
from tokprune.bench import memory
from tokprune.bench import run as bench_run
from tokprune.bench.ideal import Lengths, observe, shortened
from tokprune.bench.instrumented import Instrumented, Place
from tokprune.bench.measure import PARTS, Variant, measure, measure_trials
from tokprune.bench.models import PRESETS, parameters_of, random_model, shape_of
from tokprune.bench.prompts import encode, prompt
from tokprune.bench.run import bench, trials_of
from tokprune.bench.table import tables
from tokprune.engine.shared_encoder import SharedEncoder
from tokprune.families import bind
from tokprune.methods import image_methods, make_method

ROOT = Path(__file__).resolve().parent.parent
CASES = {**methods_table.CORE, "visionzip-spatial": methods_table.ALL["visionzip-spatial"]}


def equal_rows(model: Any, rows: int = 2) -> dict[str, torch.Tensor]:
    """A batch of one prompt several times."""
    one = tiny.make_inputs(model, [[4, "image", 6]])
    return {n: v.repeat(rows, *[1] * (v.dim() - 1)) for n, v in one.items()}


def hooks(model: torch.nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    return sum(len(getattr(m, kind)) for m in model.modules() for kind in kinds)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.llava()


# ------------------------------------------------------------------------------ measuring


def test_every_part_of_every_variant_is_measured_each_round(model: Any) -> None:
    inputs = tiny.make_inputs(model, [[4, "image", 6], [2, "image", 3]])  # padded
    variants = {"none": None, "again": None, "todre": make_method("todre", keep=9),
            "pitome": make_method("pitome", keep=9)}  # fmt: skip
    told: list[tuple[int, int]] = []
    times = measure_trials(model, inputs, variants, 2, 3, progress=lambda *now: told.append(now))
    assert list(times) == list(variants)
    for name, parts in times.items():
        wanted = [p for p in PARTS if p != "selection" or variants[name] is not None]
        assert list(parts) == wanted
        assert all(len(v) == 2 and min(v) > 0 for v in parts.values())
    assert told == [(0, 2), (1, 2), (2, 2)]
    assert not is_patched(model)


@pytest.mark.parametrize(("rounds_wanted", "kept"), [(0, 1), (1, 1), (3, 3), (99, 4)])
def test_rounds_end_when_it_is_enough(model: Any, rounds_wanted: int, kept: int) -> None:
    inputs = tiny.make_inputs(model, [[4, "image", 6]])
    told: list[tuple[int, int]] = []
    asked = iter(range(-1, 99))  # the warm-up first
    times = measure_trials(
        model, inputs, {"none": None, "random": make_method("random", keep=9)}, 4, 2,
        progress=lambda *now: told.append(now),
        enough=lambda: next(asked) + 1 >= rounds_wanted,
    )  # fmt: skip
    assert {len(v) for parts in times.values() for v in parts.values()} == {kept}
    assert told[-1] == (4, 4)


def test_one_new_token_leaves_nothing_to_decode(model: Any) -> None:
    inputs = tiny.make_inputs(model, [[4, "image", 6]])
    times = measure_trials(model, inputs, {"none": None}, 1, 1)
    assert list(times["none"]) == ["encoder", "prefill", "total"]


def test_generation_is_not_cut_short_by_an_end_token(model: Any) -> None:
    """A model that always says end-of-sequence still makes all tokens, or measure would raise."""
    head = model.lm_head.weight
    before = head.detach().clone()
    bias = model.lm_head.register_forward_hook(
        lambda m, a, out: out.index_fill(-1, torch.tensor([2]), 1e4)
    )
    try:
        inputs = tiny.make_inputs(model, [[4, "image", 6]])
        measure(model, inputs, {"none": Variant.of(model, None)}, 1, 5, parts=("total",))
    finally:
        bias.remove()
    assert torch.equal(head, before)


def test_variants_take_turns(model: Any) -> None:
    from contextlib import contextmanager

    order: list[str] = []

    def variant(name: str) -> Variant:
        @contextmanager
        def context() -> Any:
            order.append(name)
            yield

        return Variant(context)

    inputs = tiny.make_inputs(model, [[4, "image", 6]])
    variants = {name: variant(name) for name in "abc"}
    measure(model, inputs, variants, 2, 1, parts=("prefill",), warmup=0)
    assert "".join(order) == "abccba"


def test_a_variant_with_inputs_of_its_own_gets_them_in_every_part(model: Any) -> None:
    inputs = tiny.make_inputs(model, [[4, "image", 6]])
    other = tiny.make_inputs(model, [[4, "image", 2]])
    seen: set[int] = set()  # lengths of the prompts
    watch = model.model.register_forward_pre_hook(
        lambda m, args, call: seen.add(call["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        times = measure_trials(
            model, inputs, {"none": None, "small": None}, 1, 1, own_inputs={"small": other}
        )
        assert list(times["small"]) == ["encoder", "prefill", "total"]
        assert seen == {inputs["input_ids"].shape[1], other["input_ids"].shape[1]}
        with pytest.raises(ValueError, match=r"own_inputs names \['b'\]"):
            measure_trials(model, inputs, {"none": None}, 1, 1, own_inputs={"b": other})
        with pytest.raises(ValueError, match="pixel_values"):
            measure_trials(
                model, inputs, {"none": None}, 1, 1,
                own_inputs={"none": {"input_ids": other["input_ids"]}},
            )  # fmt: skip
    finally:
        watch.remove()


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_model_is_unpatched_after_an_exception_inside(model: Any, kind: type) -> None:
    inputs = tiny.make_inputs(model, [[4, "image", 6]])
    calls = 0

    def fail(place: Place, function: Any, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:  # in a later round
            raise kind("stop")
        return function(*arguments)

    variants = {"none": None, "bad": Instrumented(make_method("random", keep=5), fail)}
    with torch.inference_mode():
        model(**inputs)  # transformers puts hooks of its own in, once
    before = hooks(model)
    import gc

    with pytest.raises(kind, match="stop"):
        measure_trials(model, inputs, variants, 5, 2)
    assert not is_patched(model)
    assert hooks(model) == before
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"variants": {}}, ValueError, "variants is empty"),
        ({"variants": {"x": "todre"}}, TypeError, r"variants\['x'\]='todre'"),
        ({"rounds": 0}, ValueError, "rounds=0"),
        ({"rounds": True}, ValueError, "rounds=True"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens=0"),
        ({"inputs": {"input_ids": torch.ones(1, 3)}}, ValueError, "pixel_values"),
        ({"clock": "sun"}, ValueError, "clock='sun'"),
    ],
)
def test_bad_arguments_of_measure_trials(
    model: Any, changes: dict[str, Any], error: type, said: str
) -> None:
    inputs = tiny.make_inputs(model, [[4, "image", 6]])
    given: dict[str, Any] = {"inputs": inputs, "variants": {"none": None}, "rounds": 1,
                             "max_new_tokens": 1, **changes}  # fmt: skip
    with pytest.raises(error, match=said):
        measure_trials(model, **given)


def test_a_patched_model_or_a_shared_encoder_is_refused(model: Any) -> None:
    inputs = tiny.make_inputs(model, [[4, "image", 6]])
    tokprune.patch(model, "random", keep=4)
    try:
        with pytest.raises(ValueError, match="unpatch"):
            measure_trials(model, inputs, {"none": None}, 1, 1)
    finally:
        tokprune.unpatch(model)
    with SharedEncoder(bind(model)), pytest.raises(ValueError, match="get_image_features"):
        measure_trials(model, inputs, {"none": None}, 1, 1)


@pytest.mark.parametrize("case", sorted(methods_table.CORE))
def test_watched_method_gives_the_method_s_answers(model: Any, case: str) -> None:
    name, options = methods_table.ALL[case]
    method, inputs = make_method(name, **options), equal_rows(model)
    places: list[Place] = []

    def watch(place: Place, function: Any, *arguments: Any) -> Any:
        places.append(place)
        return function(*arguments)

    with torch.inference_mode():
        with tokprune.compress(model, method):
            own = model(**inputs).logits
        with tokprune.compress(model, Instrumented(method, watch)):
            watched = model(**inputs).logits
    assert torch.equal(own, watched)
    assert places


# ------------------------------------------------------------------------------ the ideal


@pytest.mark.parametrize(
    ("family", "tower", "decoder", "attention"),
    [
        ("llava", "clip", "llama", "sdpa"),
        ("llava_next", "clip", "llama", "eager"),
        ("llava", "siglip", "qwen2", "eager"),
        ("llava_next", "siglip", "mistral", "sdpa"),
    ],
)
def test_ideal_has_the_method_s_tokens_in_every_layer(
    family: str, tower: str, decoder: str, attention: str
) -> None:
    model = tiny.BUILDERS[family](tower, decoder, attention)
    inputs = equal_rows(model)
    with torch.inference_mode():
        model(**inputs)
    before = hooks(model)
    for case, (name, options) in CASES.items():
        method = make_method(name, **options)
        with tokprune.compress(model, method) as trace, torch.inference_mode():
            model(**inputs)
        assert trace.last is not None
        lengths = observe(model, inputs, method)
        # as many as the trace says (padding apart; a class token that is kept is no patch there)
        assert lengths.decoder == tuple(max(x.lengths) for x in trace.last.layers), case
        assert lengths.cached == tuple(max(x.cached) for x in trace.last.layers), case
        assert lengths.original == max(trace.last.original_lengths)
        if name not in ("visionzip", "prunesid"):
            rows = [trace.last.tower_rows(r) for r in trace.last.records]
            longest = [
                (max(max(r[i][0]) for r in rows), max(max(r[i][1]) for r in rows))
                for i in range(len(rows[0]))
            ]
            assert list(lengths.encoder) == longest, case
        with shortened(model, lengths):
            assert observe(model, inputs) == lengths, case
            made = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert made.shape[1] == lengths.original + 3
        assert hooks(model) == before


def test_ideal_decodes_on_caches_as_short_as_the_method_s(model: Any) -> None:
    from tokprune.bench.measure import cache_argument, new_cache

    name, options = methods_table.ALL["mustdrop"]  # prunes the cache after the prefill, too
    inputs = equal_rows(model, 1)
    lengths = observe(model, inputs, make_method(name, **options))
    assert len(set(lengths.cached)) > 1
    assert lengths.cached != lengths.decoder
    cache = new_cache(model)
    given = {cache_argument(model): cache, "use_cache": True}
    with torch.inference_mode(), shortened(model, lengths):
        logits = model(**inputs, **given).logits
        for _ in range(2):
            logits = model(input_ids=logits[:, -1:].argmax(-1), **given).logits
    assert [layer.keys.shape[-2] for layer in cache.layers] == [n + 2 for n in lengths.cached]
    assert cache.get_seq_length() == lengths.original + 2


@pytest.mark.parametrize("family", sorted(tiny.BUILDERS))
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_ideal_at_full_length_is_the_model(family: str, attention: str) -> None:
    model = tiny.BUILDERS[family](attention=attention)
    inputs = equal_rows(model)
    full = observe(model, inputs)
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with torch.inference_mode():
        plain, answer = model(**inputs).logits, model.generate(**inputs, **options)
        with shortened(model, full):
            assert torch.equal(model(**inputs).logits, plain)
            assert torch.equal(model.generate(**inputs, **options), answer)


def test_ideal_after_dropping_a_head_of_the_prompt_is_that_shorter_prompt(model: Any) -> None:
    """Slicing every layer alike gives the logits of the model on the sliced embeddings."""
    inputs = equal_rows(model, 1)
    full = observe(model, inputs)
    count = full.original - 9
    lengths = Lengths(full.encoder, full.projected, (count,) * 8, (count,) * 8, full.original)
    seen: list[torch.Tensor] = []
    token_grid = model.model.language_model.register_forward_pre_hook(
        lambda m, a, k: seen.append(k["inputs_embeds"]), with_kwargs=True
    )
    with torch.inference_mode():
        model(**inputs)
        token_grid.remove()
        with shortened(model, lengths):
            short = model(**inputs).logits[:, -1]
        # rotary attention sees distances only, so where the numbering starts does not matter
        alone = model.model.language_model(inputs_embeds=seen[0][:, -count:]).last_hidden_state
        expected = model.lm_head(alone)[:, -1]
    torch.testing.assert_close(short, expected, rtol=1e-4, atol=1e-4)


def test_ideal_refuses_another_prompt_and_leaves_no_hook(model: Any) -> None:
    inputs = equal_rows(model, 1)
    with torch.inference_mode():
        model(**inputs)
    before = hooks(model)
    lengths = observe(model, inputs, make_method("random", keep=5))
    longer = tiny.make_inputs(model, [[4, "image", 9]])
    with pytest.raises(ValueError, match="prompt of"), shortened(model, lengths):
        model(**longer)
    assert hooks(model) == before


# ------------------------------------------------------------------------------ the bench


@pytest.fixture(scope="module")
def result(model: Any) -> dict[str, Any]:
    objects = [tokprune.FastV(keep=7), "pitome"]
    return bench(
        model, objects, [9, 0.5], rounds=2, new_tokens=2, batch_sizes=(1, 2), text_tokens=(8,)
    )


def test_bench_result_is_complete_and_survives_json(result: dict[str, Any]) -> None:
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert [c["trial"] for c in result["trials"]] == ["fastv", "pitome@9", "pitome@0.5"]
    assert [(p["batch_size"], p["prompt_tokens"]) for p in result["points"]] == [(1, 44), (2, 44)]
    first, second = result["points"]
    compared = ["encoder", "prefill", "decode_per_token", "total"]
    assert list(first["noise_floor"]) == compared
    assert list(second["noise_floor"]) == ["prefill", "total"]
    for point in (first, second):
        for trial in result["trials"]:
            own = point["trials"][trial["trial"]]
            for part in point["noise_floor"]:
                for kind in ("seconds", "ideal_seconds"):
                    assert own[kind][part]["median"] > 0
                    assert own[kind][part]["n"] == 2
                for kind in ("speedup", "ideal_speedup"):
                    assert own[kind][part]["speedup"] is None  # two rounds prove nothing
                    assert "too few rounds" in own[kind][part]["reason"]
                assert own["achieved"][part]["median"] > 0
    assert "selection" in first["trials"]["fastv"]["seconds"]
    assert "selection" not in first["unpruned"]
    assert "selection" not in first["trials"]["fastv"]["ideal_seconds"]


def test_bench_counts_tokens_flops_and_bytes(result: dict[str, Any], model: Any) -> None:
    plain = result["unpruned"]
    assert plain["tokens_last"] == plain["tokens_mean"] == 36
    # keys and values, 2 heads of 8 numbers, 4 bytes, 8 layers, 44 tokens
    assert plain["kv_bytes"] == 2 * 2 * 8 * 4 * 8 * 44
    fastv, pitome, half = result["trials"]
    assert (fastv["tokens_last"], fastv["tokens_mean"]) == (7, (2 * 36 + 6 * 7) / 8)
    assert fastv["kv_bytes"] == 2 * 2 * 8 * 4 * (2 * 44 + 6 * 15)
    assert pitome["tokens_last"] == pitome["tokens_mean"] == 9
    assert half["tokens_last"] == 18
    assert pitome["flops_prefill"] < half["flops_prefill"] < plain["flops_prefill"]
    inputs = prompt(model, encode(model), 8, 1)
    with tokprune.compress(model, tokprune.FastV(keep=7)) as trace, torch.inference_mode():
        model(**inputs, logits_to_keep=1)
    assert fastv["flops_prefill"] == 2 * trace.to_dict()["macs"]["total"]
    for trial in (plain, *result["trials"]):
        assert trial["peak_memory"]["bytes"] >= 0
        assert trial["peak_memory"]["source"]
    assert not is_patched(model)


def test_tables_fit_100_columns(result: dict[str, Any]) -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    for part in tables(result):
        console.print(part, highlight=False, markup=False)
    text = console.export_text()
    for word in ("unpruned", "fastv", "pitome@0.5", "its ideal", "too few rounds", "never in the",
                 "achieved ÷ ideal", "Noise floor", "7/14", "batch 2 × 44 tokens"):  # fmt: skip
        assert word in text
    assert max(map(len, text.splitlines())) <= 100


def test_running_out_of_memory_at_a_later_point_is_reported(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = bench_run._point

    def point(model: Any, inputs: Any, *rest: Any) -> Any:
        if len(inputs["input_ids"]) == 3:
            raise torch.OutOfMemoryError("no room\nfor details")
        return own(model, inputs, *rest)

    monkeypatch.setattr(bench_run, "_point", point)
    options: dict[str, Any] = {"rounds": 1, "new_tokens": 1, "text_tokens": (8,)}
    found = bench(model, ["random"], [5], batch_sizes=(1, 3), **options)
    assert found["points"][1]["error"] == "out of memory: no room"
    measured = found["trials"][0]["break_even"]["measured"]
    assert measured == [{"batch_size": 1, "prompt_tokens": 44}]
    console = Console(width=100, record=True, file=io.StringIO())
    for part in tables(found):
        console.print(part)
    assert "out of memory: no room" in " ".join(console.export_text().split())
    with pytest.raises(torch.OutOfMemoryError):
        bench(model, ["random"], [5], batch_sizes=(3, 1), **options)
    assert not is_patched(model)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"methods": []}, ValueError, "methods is empty"),
        ({"methods": ["todree"]}, ValueError, "Did you mean 'todre'"),
        ({"keeps": []}, ValueError, "keep is empty"),
        ({"keeps": [0]}, ValueError, "keep=0"),
        ({"keeps": [9999]}, ValueError, "keep=9999"),
        ({"keeps": [5, 5]}, ValueError, "stands there twice"),
        ({"rounds": 0}, ValueError, "rounds=0"),
        ({"new_tokens": 0}, ValueError, "new_tokens=0"),
        ({"batch_sizes": ()}, ValueError, "batch_sizes is empty"),
        ({"batch_sizes": (1, 1)}, ValueError, "twice"),
        ({"text_tokens": (1,)}, ValueError, "text_tokens=1"),
        ({"text_tokens": (8, 4000)}, ValueError, "2048 positions"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(
    model: Any, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], error: type, said: str
) -> None:
    def no_work(*_: Any, **__: Any) -> Any:
        raise AssertionError("work was done")

    monkeypatch.setattr(bench_run, "_sizes", no_work)
    monkeypatch.setattr(bench_run, "_point", no_work)
    with pytest.raises(error, match=said):
        bench(model, **{"methods": ["random"], "keeps": [5], **changes})


def test_trials_place_published_layers_in_a_short_decoder() -> None:
    trials = trials_of(sorted(image_methods()), [9], 8)
    assert [c.id for c in trials] == [f"{n}@9" for n in sorted(image_methods())]
    facts_of = tiny.llava()
    from tokprune.families import family_of

    family = family_of(facts_of)
    facts = family.facts(facts_of, family.parts(facts_of))
    for trial in trials:
        trial.method.plan(facts)  # raises where a layer does not fit
    twice = trials_of([tokprune.FastV(keep=3), tokprune.FastV(keep=4)], [], 8)
    assert [c.id for c in twice] == ["fastv", "fastv#2"]


# ------------------------------------------------------------------------------ prompts


@pytest.mark.parametrize("family", sorted(tiny.BUILDERS))
def test_prompts_have_the_length_asked_for(family: str) -> None:
    model = tiny.BUILDERS[family]()
    processor = tiny_processor.processor(model)
    for given in (None, processor):
        image = encode(model, None, given)
        assert image.tokens == tiny.tokens_of(model, (480, 640))
        tokenizer = None if given is None else given.tokenizer
        inputs = prompt(model, image, 11, 2, tokenizer)
        ids = inputs["input_ids"]
        assert ids.shape == (2, 11 + image.tokens)
        assert int((ids == tiny.IMAGE_TOKEN).sum()) == 2 * image.tokens
        assert ids[0, 0] != tiny.IMAGE_TOKEN
        assert ids[0, -1] != tiny.IMAGE_TOKEN
        assert torch.equal(inputs["pixel_values"][0], inputs["pixel_values"][1])
        with torch.inference_mode():
            assert torch.isfinite(model(**inputs).logits).all()


# ------------------------------------------------------------------------------ models


def published_parameters(vision_layers: int, c: int, m: int, layers: int, d: int, f: int) -> int:
    """Weights of LLaVA-1.5 by hand: CLIP-L/14 of 577 positions, an MLP projector, Llama."""
    block = 4 * (c * c + c) + (c * m + m) + (m * c + c) + 4 * c
    tower = c + 3 * 14 * 14 * c + 577 * c + 2 * c + vision_layers * block + 2 * c
    projector = c * d + d + d * d + d
    llama = layers * (4 * d * d + 3 * d * f + 2 * d) + d + 2 * 32064 * d
    return tower + projector + llama


def test_presets_have_the_published_sizes() -> None:
    assert parameters_of(shape_of("llava-1.5-7b")) == 7_063_427_072
    assert parameters_of(shape_of("llava-1.5-7b")) == published_parameters(
        24, 1024, 4096, 32, 4096, 11008
    )
    assert parameters_of(shape_of("llava-1.5-13b")) == published_parameters(
        24, 1024, 4096, 40, 5120, 13824
    )
    # the same language model and tower, and one newline embedding
    assert parameters_of(shape_of("llava-next-7b")) == 7_063_427_072 + 4096
    assert parameters_of(shape_of("tiny")) == pytest.approx(2e6, rel=0.1)
    assert parameters_of(shape_of("small")) == pytest.approx(36e6, rel=0.1)
    assert all(shape.source for shape in PRESETS.values())


def test_random_model_is_made_in_its_dtype_and_repeatably() -> None:
    model = random_model("tiny", dtype=torch.bfloat16, seed=3)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32
    assert not model.training
    again = random_model("tiny", dtype=torch.bfloat16, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    weights = dict(model.named_parameters())
    assert all(float(p.detach().float().std()) > 0 for p in weights.values() if p.numel() > 1)
    inputs = prompt(model, encode(model), 8, 1)
    with torch.inference_mode():
        assert torch.isfinite(model(**inputs).logits).all()


def test_too_little_memory_is_said_before_anything_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    from tokprune.bench import models

    monkeypatch.setattr(models, "free_memory", lambda device: 8 * 10**9)
    with pytest.raises(MemoryError, match=r"need 29\.3 GB of memory.*8\.0 GB are free.*bfloat16"):
        random_model("llava-1.5-7b")
    with pytest.raises(ValueError, match=r"Did you mean 'llava-1.5-7b'"):
        random_model("llava-1.5-7")


# ------------------------------------------------------------------------------ memory


def test_peak_memory_sees_what_is_freed_again() -> None:
    size = 64 * 2**20

    def work() -> None:
        torch.ones(size // 4).sum()

    work()  # the second time the allocator could reuse the first one's memory
    peak = memory.peak_memory(work, torch.device("cpu"))
    assert size * 0.9 < peak.bytes < size * 1.5
    assert "resident memory" in peak.source


def test_peak_memory_where_the_kernel_keeps_no_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_reset_mark", lambda: False)

    def work() -> None:
        held = torch.ones(2**24)
        for _ in range(5):  # long enough for a look from the sampling thread
            held.mul_(1.5)

    peak = memory.peak_memory(work, torch.device("cpu"))
    assert 2**26 * 0.9 < peak.bytes < 2**26 * 1.5
    assert "sampled" in peak.source


# ------------------------------------------------------------------------------ command line


def command(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "tokprune", "bench", *arguments],
        capture_output=True, text=True, cwd=cwd, env=environment,
    )  # fmt: skip


def test_command_line_measures_a_saved_model(tmp_path: Path) -> None:
    folder = tiny_processor.save(tmp_path / "model")
    target = tmp_path / "bench.json"
    done = command(
        "--model", str(folder), "--methods", "random,fastv", "--keep", "9,0.5", "--rounds", "6",
        "--new-tokens", "2", "--batch-sizes", "1", "--text-tokens", "8,20", "--json", str(target),
        "--clock", "cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(target.read_text())
    trials = [c["trial"] for c in found["trials"]]
    assert trials == ["random@9", "random@0.5", "fastv@9", "fastv@0.5"]
    assert all(trial in done.stdout for trial in trials)
    assert found["settings"]["clock"] == "cpu"
    assert found["points"][0]["trials"]["fastv@9"]["speedup"]["total"]["ratio"]["low"] > 0
    for point in found["points"]:
        for name in trials:
            told = point["trials"][name]["speedup"]["total"]
            assert (told["speedup"] is None) == ("within noise" in str(told["reason"]))
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["bench.json"]


def test_command_line_measures_random_weights(capsys: pytest.CaptureFixture[str]) -> None:
    from tokprune.cli import app

    options = {
        "--random-weights": "tiny", "--methods": "divprune", "--keep": "64", "--rounds": "1",
        "--new-tokens": "1", "--batch-sizes": "1", "--text-tokens": "16", "--dtype": "bfloat16",
        "--attention": "eager", "--threads": "1", "--device": "cpu",
    }  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        app(["bench", *[x for pair in options.items() for x in pair]])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "random weights tiny" in printed
    assert "bfloat16, eager, 576 visual tokens" in printed


GOOD = {"--random-weights": "tiny", "--methods": "todre", "--keep": "64"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"--random-weights": "llava-1.5-8b"}, "known: tiny, small, llava-1.5-7b"),
        ({"--random-weights": None}, "one of --model and --random-weights"),
        ({"--model": "x"}, "one of --model and --random-weights"),
        ({"--random-weights": None, "--model": "./nowhere"}, "--model ./nowhere: no such folder"),
        ({"--methods": None}, "--methods"),
        ({"--methods": ""}, "--methods ''"),
        ({"--methods": "todre,"}, "separated by commas"),
        ({"--methods": "todree"}, "Did you mean 'todre'"),
        ({"--keep": None}, "--keep"),
        ({"--keep": ""}, "--keep ''"),
        ({"--keep": "0"}, "--keep 0"),
        ({"--keep": "1.5"}, "--keep 1.5"),
        ({"--keep": "nan"}, "--keep nan"),
        ({"--keep": "many"}, "--keep 'many'"),
        ({"--keep": "64,64"}, "stands there twice"),
        ({"--keep": "600"}, "keep=600"),
        ({"--rounds": "0"}, "--rounds 0"),
        ({"--new-tokens": "0"}, "--new-tokens 0"),
        ({"--batch-sizes": "0,1"}, "--batch-sizes '0,1'"),
        ({"--text-tokens": "1"}, "text_tokens=1"),
        ({"--text-tokens": "9000"}, "4096 positions"),
        ({"--image": "nowhere.png"}, "--image nowhere.png: no such file"),
        ({"--json": "/nowhere/x.json"}, "--json /nowhere/x.json: no such folder"),
        ({"--json": "."}, "is a folder"),
        ({"--attention": "fast"}, "fast"),
        ({"--dtype": "int8"}, "int8"),
        ({"--threads": "0"}, "threads"),
        ({"--device": "cuda"}, "no CUDA device"),
    ],
)
def test_bad_input_is_one_line(
    changes: dict[str, str | None], said: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import tokprune.cli.bench  # noqa: F401
    from tokprune.cli import app

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("_sizes", "_point"):
        monkeypatch.setattr(bench_run, name, lambda *a, **k: pytest.fail("work was done"))
    given = {**GOOD, **changes}
    arguments = [x for name, value in given.items() if value is not None for x in (name, value)]
    with pytest.raises(SystemExit) as stop:
        app(["bench", *arguments])
    assert stop.value.code == 2
    told = capsys.readouterr()
    assert said in told.err
    assert len(told.err.splitlines()) == 1
    assert not told.out


def test_missing_extra_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokprune.cli import app

    real = __import__("importlib.util").util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *a: None if name == "psutil" else real(name, *a)
    )
    with pytest.raises(SystemExit) as stop:
        app(["bench", *[x for pair in GOOD.items() for x in pair]])
    assert stop.value.code == 2
    assert "pip install 'tokprune[sweep]'" in capsys.readouterr().err
