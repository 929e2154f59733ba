"""What a trace says: which original tokens live, and how much of everything was saved."""

from __future__ import annotations

import gc
import json
import weakref
from typing import Any

import pytest
import tiny
import torch
from methods_table import ALL
from toy_methods import DropInDecoder, MergeAtInput, MergeInTower

import tokprune


def traced(
    model: Any, method: Any, prompts: list[list[Any]], **options: Any
) -> tuple[tokprune.Trace, dict[str, Any]]:
    inputs = tiny.make_inputs(model, prompts, **options)
    with torch.no_grad(), tokprune.compress(model, method) as trace:
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    entry = trace.to_dict()
    assert json.loads(json.dumps(entry)) == entry
    return trace, entry


def cells(tokens: list[Any]) -> list[tuple[int, int]]:
    return [(t.row, t.col) for t in tokens]


# ------------------------------------------------------------------------ survivors


def test_prompt_selection_is_named_by_cell_and_column() -> None:
    trace, entry = traced(tiny.llava(), tokprune.Random(keep=10), [[4, "image", 6]])
    assert trace.last is not None
    chosen = trace.last.images[0].selection.index.tolist()
    kept = trace.kept()
    assert cells(kept) == [divmod(i, tiny.GRID) for i in chosen]
    assert [t.column for t in kept] == [4 + i for i in chosen]
    assert all(t.sources == ((0, t.row, t.col),) for t in kept)
    stages = entry["images"][0]["stages"]
    assert [(s["stage"], s["layers"], s["count"]) for s in stages] == [
        ("prompt", None, 10),
        ("decoder", [0, 7], 10),
    ]
    assert stages[0]["tokens"][0] == {
        "image": 0, "tile": 0, "row": kept[0].row, "col": kept[0].col, "column": kept[0].column,
    }  # fmt: skip


def test_decoder_drop_by_layer_with_padding_and_two_images() -> None:
    trace, entry = traced(
        tiny.llava(), DropInDecoder(keep=5, layer=3), [[4, "image", 2, "image", 6], [1, "image", 3]]
    )
    assert [len(trace.kept(layer)) for layer in (0, 2, 3, 7, -1)] == [72, 72, 10, 10, 10]
    assert [len(trace.kept(layer, batch_row=1)) for layer in (0, 3)] == [36, 5]
    first, second = trace.kept(3)[:5], trace.kept(3)[5:]
    assert [t.image for t in first + second] == [0] * 5 + [1] * 5
    assert cells(first) == cells(second) == [(0, c) for c in range(5)]
    gap = entry["tokens_in"][0] - entry["tokens_in"][1]  # left padding
    assert [t.column for t in trace.kept(3, 1)] == [gap + 1 + c for c in range(5)]
    decoder = entry["decoder"]
    assert decoder[2]["visual"] == [[36, 36], [36]]
    assert decoder[3]["visual"] == [[5, 5], [5]]
    assert decoder[3]["total"] == [10 + 12, 5 + 4]
    assert [len(p) for p in decoder[3]["positions"]] == [22, 9]
    assert decoder[3]["positions"][1] == [0, 1, 2, 3, 4, 5, 37, 38, 39]
    assert entry["visual_tokens_in"] == [72, 36]
    assert entry["visual_tokens_out"] == [10, 5]


def test_merge_at_language_model_lists_sources() -> None:
    trace, entry = traced(tiny.llava(), MergeAtInput(step=3), [[4, "image", 6]])
    for number, token in enumerate(trace.kept()):
        held = [divmod(3 * number + i, tiny.GRID) for i in range(3)]
        assert token.sources == tuple((0, r, c) for r, c in held)
    assert entry["images"][0]["stages"][0]["tokens"][1]["sources"] == [
        [0, 0, 3], [0, 0, 4], [0, 0, 5],
    ]  # fmt: skip


@pytest.mark.parametrize("between", [True, False])
def test_merge_in_the_tower_then_everywhere(between: bool) -> None:
    method = tokprune.compose(
        MergeInTower(layer=2, between=between, drop=4), MergeAtInput(step=2), DropInDecoder(keep=3)
    )
    trace, entry = traced(tiny.llava(), method, [[4, "image", 6]])
    stages = entry["images"][0]["stages"]
    assert [(s["stage"], s["layers"], s["count"]) for s in stages] == [
        ("encoder", [2, 2], 18), ("encoder", [3, 3], 14), ("prompt", None, 7),
        ("decoder", [0, 2], 7), ("decoder", [3, 7], 3),
    ]  # fmt: skip
    assert stages[0]["tokens"][1]["sources"] == [[0, 0, 2], [0, 0, 3]]
    assert stages[1]["tokens"][0]["sources"] == [[0, 0, 0], [0, 0, 1]]
    # pairs of pairs: four neighbours each
    assert [t.sources for t in trace.kept()] == [
        tuple((0, *divmod(4 * k + i, tiny.GRID)) for i in range(4)) for k in range(3)
    ]
    rows = [(e["attention_rows"], e["mlp_rows"]) for e in entry["encoder"]]
    full, half, last = [[37]], [[19]], [[15]]
    third = (full, half) if between else (full, full)
    assert rows == [(full, full), (full, full), third, (half, half), (last, last), (last, last)]


def test_tiles_newlines_and_unpadding() -> None:
    model = tiny.llava_next()
    trace, entry = traced(model, DropInDecoder(keep=60), [[4, "image", 6]], sizes=[(20, 40)])
    tokens = trace.kept(0)
    image = entry["images"][0]
    assert image["tiles"] == 3
    assert [t.column for t in tokens] == list(range(4, 4 + len(tokens)))
    assert [t.kind for t in tokens].count("newline") == 6
    assert {t.tile for t in tokens} == {-1, 0, 1, 2}
    assert len(trace.kept()) == 60
    reduced, _ = traced(model, MergeInTower(), [[4, "image", 6]], sizes=[(20, 48)])
    assert all(t.kind == "patch" for t in reduced.kept())
    assert all(len(t.sources or ()) == 2 for t in reduced.kept())


def test_kept_rejects_bad_places() -> None:
    trace, _ = traced(tiny.llava(), tokprune.Random(keep=3), [[4, "image", 6]])
    with pytest.raises(IndexError, match="layer=8"):
        trace.kept(8)
    with pytest.raises(IndexError, match="batch_row=1"):
        trace.kept(batch_row=1)


# ---------------------------------------------------------------------------- totals


@pytest.mark.parametrize("family", tiny.BUILDERS)
@pytest.mark.parametrize("name", ALL)
def test_every_method_has_a_consistent_trace(family: str, name: str) -> None:
    method, options = ALL[name]
    made = tokprune.make_method(method, **options)
    trace, entry = traced(
        tiny.BUILDERS[family](), made, [[4, "image", 6, "image", 2], [3, "image", 5]]
    )
    assert entry["recorded"]
    assert not entry["nothing_removed"]
    for layer in entry["decoder"]:
        for row in range(2):
            kept = trace.kept(layer["layer"], row)
            assert len(kept) == sum(layer["visual"][row])
            assert len(layer["positions"][row]) == layer["total"][row]
            held = [c for t in kept for c in t.sources or ()]
            assert len(held) == len({(t.image, c) for t in kept for c in t.sources or ()})
    assert entry["macs"]["total"] < entry["macs_unpruned"]["total"]
    assert entry["kv_bytes"] < entry["kv_bytes_unpruned"]
    text = trace.summary()
    assert "\x1b" not in text
    assert "NOTHING" not in text


def test_kv_bytes_are_those_of_the_cache() -> None:
    model = tiny.llava()
    inputs = tiny.make_inputs(model, [[4, "image", 6]])
    with torch.no_grad(), tokprune.compress(model, DropInDecoder(cache=True)) as trace:
        cache = model(**inputs).past_key_values
    held = [x.keys.nbytes + x.values.nbytes for x in cache.layers]
    entry = trace.to_dict()
    assert [layer["kv_bytes"] for layer in entry["decoder"]] == held
    assert [layer["kv_entries"] for layer in entry["decoder"]][-2:] == [[15], [10]]
    with torch.no_grad():
        cache = model(**inputs).past_key_values
    assert entry["kv_bytes_unpruned"] == sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)


def test_summary_numbers() -> None:
    trace, entry = traced(tiny.llava(), DropInDecoder(keep=6, layer=2), [[4, "image", 6]])
    text = trace.summary()
    lines = [line.split("|") for line in text.splitlines() if "|" in line]
    table = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in lines}
    assert table["encoder 0-5"][:2] == ["36", "37"]
    assert table["decoder 0-1"][:2] == ["36", "46"]
    assert table["decoder 2-7"][:2] == ["6", "16"]
    shares = [float(row[-1].removesuffix(" %")) for row in table.values() if "%" in row[-1]]
    assert sum(shares) == pytest.approx(100, abs=0.3)
    assert "36 -> 6 (16.7 %)" in text
    assert "6 after the last pruning, 13.5 on average over all layers" in text
    ratio = 100 * entry["macs"]["total"] / entry["macs_unpruned"]["total"]
    assert f"({ratio:.1f} %; FLOPs = 2 x MACs" in text
    assert entry["mean_visual_tokens"] == 13.5


def test_nothing_removed_is_loud() -> None:
    trace, entry = traced(tiny.llava(), tokprune.Random(keep=1.0), [[4, "image", 6]])
    assert "NOTHING WAS REMOVED" in trace.summary()
    assert entry["nothing_removed"]
    assert entry["macs"] == entry["macs_unpruned"]
    # a cache that was pruned is something, even where every layer saw everything
    trace, entry = traced(tiny.llava(), DropInDecoder(keep=36, cache=True), [[4, "image", 6]])
    assert "NOTHING" not in trace.summary()
    assert entry["visual_tokens_out"] == [36]


def test_text_only_leaves_no_trace() -> None:
    trace, entry = traced(tiny.llava(), tokprune.Random(keep=3), [[7]])
    assert "No prefill with images was recorded" in trace.summary()
    assert entry["recorded"] is False
    with pytest.raises(RuntimeError, match="no prefill with images"):
        trace.kept()


def test_without_cache() -> None:
    model = tiny.llava()
    inputs = tiny.make_inputs(model, [[4, "image", 6]])
    with torch.no_grad(), tokprune.compress(model, "random", keep=4) as trace:
        model(**inputs, use_cache=False)
    assert trace.to_dict()["kv_bytes"] == 0
    assert "no cache" in trace.summary()
    assert "KV cache" not in trace.summary()


def test_prompt_given_as_embeddings() -> None:
    model = tiny.llava()
    visual = torch.zeros(1, 20, dtype=torch.bool)
    visual[:, 5:15] = True
    embeds = torch.randn(1, 20, 32, generator=torch.Generator().manual_seed(0))
    with (
        torch.no_grad(),
        tokprune.visual_positions(visual),
        tokprune.compress(model, DropInDecoder(keep=4)) as trace,
    ):
        model(inputs_embeds=embeds, attention_mask=torch.ones(1, 20, dtype=torch.long))
    assert [t.column for t in trace.kept()] == [5, 6, 7, 8]
    entry = trace.to_dict()
    assert entry["encoder"] == []
    assert entry["macs"]["projector"] == 0
    assert "projector" not in trace.summary()


def test_trace_keeps_neither_weights_nor_features_alive() -> None:
    model = tiny.llava()
    trace, _ = traced(model, tokprune.Random(keep=4), [[4, "image", 6]])
    assert trace.last is not None
    entered = trace.last.images[0].entered
    assert entered is not None
    assert entered.count == 4
    assert entered.features.untyped_storage().nbytes() == 0
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert "visual tokens" in trace.summary()


def test_sums_over_prefills() -> None:
    model = tiny.llava()
    with torch.no_grad(), tokprune.compress(model, DropInDecoder(keep=4)) as trace:
        for prompts in ([[4, "image", 6]], [[3, "image", "image", 2]]):
            model(**tiny.make_inputs(model, prompts))
    assert trace.prefills == 2
    assert trace.mean_visual_tokens() == [54.0] * 3 + [6.0] * 5
