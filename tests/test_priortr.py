"""PriorTR: its score against the model's own maps, who asks whom, its warnings and thresholds, and
the caches of the layers before the cut."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from tiny import BUILDERS, llava, llava_next, make_inputs
from torch import Tensor

import tokprune
from tokprune.methods import PriorTR
from tokprune.operators.priortr import null_rows, prior_corrected
from tokprune.testing.oracle import compressed_logits, continuation_tokens

PROMPTS = [[4, "image", 6, "image", 9], [7, "image", 12]]


def prefill(model: Any, method: PriorTR, inputs: Any) -> Any:
    with tokprune.compress(model, method, validate=True) as trace, torch.no_grad():
        model(**inputs)
    return trace.last


# ------------------------------------------------------------------------------ operators


def test_null_rows_are_the_first_text_behind_each_image() -> None:
    segment = torch.tensor([
        [-1, -1, 0, 0, -1, 1, 1, -1, -1],  # padding, two images with text between them
        [-1, 0, 0, 1, 1, -1, 2, -1, -1],  # two images side by side, a third one
        [-1, -1, -1, -1, -1, -1, -1, 0, 0],  # nothing behind
    ])  # fmt: skip
    text = segment < 0
    text[0, 0] = False
    index, real = null_rows(segment, text, 3)
    assert index.tolist() == [[4, 7, 0], [5, 5, 7], [0, 0, 0]]
    assert real.tolist() == [[True, True, False], [True, True, True], [False, False, False]]


def test_score_by_hand() -> None:
    question, prior = torch.tensor([[3.0, 1.0, 7.0, 0.0]]), torch.tensor([[1.0, 1.0, 9.0, 0.0]])
    segment = torch.tensor([[0, 0, -1, 0]])
    got = prior_corrected(question, prior, segment)
    want = [0.75 * math.log(1.5), 0.25 * math.log(0.5), 0.0, 0.0]
    assert got[0].tolist() == pytest.approx(want, abs=1e-6)
    assert prior_corrected(question, question).abs().max() == 0
    with pytest.raises(ValueError, match=r"question has shape \(1, 4\) and prior \(1, 3\)"):
        prior_corrected(question, prior[:, :3])
    with pytest.raises(ValueError, match=r"text is torch.int64 \(1, 4\); it should be torch.bool"):
        null_rows(segment, segment, 1)


# ------------------------------------------------------------------------------ in a model


def reference(rows: Tensor, queries: str, heads: str, image: Tensor, last: int, end: int) -> Tensor:
    """Scores [n] in float64 of the tokens ``image`` [n] from a map [H, L, L]: text follows the
    prompt's last image from ``last`` on, and the prompt ends before ``end``."""
    null = int(image[-1]) + 1
    asks = {"question": range(last, end), "but_last": range(last, end - 1)}.get(queries)
    maps = rows.double()
    p = maps[:, end - 1] if asks is None else torch.stack([maps[:, r] for r in asks]).mean(0)
    q = maps[:, null]
    p, q = (x.amax(0)[image] if heads == "max" else x.mean(0)[image] for x in (p, q))
    p, q = p / p.sum(), q / q.sum()
    return p * torch.log(p / q)


@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize(
    ("queries", "heads"), [("question", "mean"), ("but_last", "max"), ("last", "mean")]
)
def test_the_best_by_the_models_own_maps_stay(family: str, queries: Any, heads: Any) -> None:
    model = BUILDERS[family](attention="eager")
    inputs = make_inputs(model, PROMPTS, [(14, 40), (30, 22), (40, 14)])
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions[1]
    seen = prefill(model, PriorTR(7, prune_before=2, queries=queries, heads=heads), inputs)
    before, after = seen.layers[1], seen.layers[2]
    for b, images in enumerate(before.counts):
        last = int((before.segment[b] >= 0).nonzero()[-1]) + 1
        for s in range(len(images)):
            own = (before.segment[b] == s).nonzero().view(-1)
            score = reference(maps[b], queries, heads, own, last, maps.shape[-1])
            best = own[score.argsort(descending=True)[:7]].sort().values
            kept = after.column[b][after.segment[b] == s]
            assert kept.tolist() == before.column[b][best].tolist()


def test_few_rows_that_ask() -> None:
    """Of two rows, "but_last" would leave the null row alone, which says nothing."""
    model, inputs = llava(), make_inputs(llava(), [[4, "image", 2]])
    kept = [
        prefill(model, PriorTR(5, queries=queries), inputs).layers[-1].column.tolist()
        for queries in ("but_last", "last")
    ]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("threshold", [None, 0.0])
@pytest.mark.parametrize("behind", [0, 1])
def test_nobody_asks(behind: int, threshold: float | None) -> None:
    """Beside a prompt that has a question."""
    model = llava()
    rows = [[4, "image", *[behind] * (behind > 0)], [3, "image", 9]]
    method = PriorTR(5, prune_before=2, score_threshold=threshold)
    with pytest.warns(UserWarning, match=r"fewer than two tokens of text follow .* row\(s\) \[0\]"):
        seen = prefill(model, method, make_inputs(model, rows))
    assert seen.layers[-1].counts[0] == [36]
    assert seen.layers[-1].counts[1][0] <= 5


@pytest.mark.parametrize(("prompt", "warned"), [([12, "image", 8], True), ([12, "image", 9], False),
                                               ([8, "image", 8], False)])  # fmt: skip
def test_a_question_before_the_image(prompt: list[Any], warned: bool) -> None:
    model = llava()
    inputs = make_inputs(model, [prompt])
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        prefill(model, PriorTR(5), inputs)
    words = [str(w.message) for w in found if "PriorTR" in str(w.message)]
    assert [("put the question after the image" in w) for w in words] == [True] * warned


def test_thresholds() -> None:
    model = llava_next()
    inputs = make_inputs(model, PROMPTS, [(14, 40), (30, 22), (40, 14)])
    counts = [
        prefill(model, PriorTR(keep, score_threshold=threshold), inputs).layers[-1].counts
        for keep, threshold in ((1.0, 0.0), (4, 0.0), (1.0, 1e6), (3, -1e6))
    ]
    whole = prefill(model, PriorTR(1.0), inputs).layers[-1].counts
    assert all(0 < n < m for a, b in zip(counts[0], whole) for n, m in zip(a, b))
    assert counts[1:] == [[[4, 4], [4]], [[1, 1], [1]], [[3, 3], [3]]]


# ------------------------------------------------------------------------------ caches


@pytest.mark.parametrize("queries", ["question", "last"])
def test_earlier_caches(queries: Any) -> None:
    """Lengths, and that only steps after the prompt see the difference."""
    model = llava()
    inputs, tokens = make_inputs(model, PROMPTS), continuation_tokens(2, 3)
    logits, cached = [], []
    for cut in (False, True):
        method = PriorTR(5, prune_before=(2, 4), queries=queries, cut_earlier_caches=cut)
        with tokprune.compress(model, method) as trace:
            logits.append(compressed_logits(model, inputs, tokens))
        cached.append([layer.cached for layer in trace.last.layers])
        lengths = [layer.lengths for layer in trace.last.layers]
    assert torch.equal(logits[0][:, 0], logits[1][:, 0])
    assert (logits[0][:, 1:] - logits[1][:, 1:]).abs().amax(-1).min() > 1e-4
    assert cached == [lengths, [lengths[-1]] * len(lengths)]
    assert lengths[0][0] > lengths[2][0] > lengths[4][0] == 4 + 5 + 6 + 5 + 9


def test_nothing_to_cut() -> None:
    model = llava()
    seen = prefill(model, PriorTR(1.0, cut_earlier_caches=True), make_inputs(model, PROMPTS))
    assert [layer.cached for layer in seen.layers] == [layer.lengths for layer in seen.layers]


# ------------------------------------------------------------------------------ options


def test_presets_say_what_they_cost() -> None:
    for preset in PriorTR.presets:
        layers, entering = (28, 100000) if preset.model == "qwen2-vl" else (32, 576)
        entering = 2880 if preset.model == "llava-next" else entering
        made = PriorTR.preset(preset.model, preset.budget)
        mean = (3 * entering + (layers - 3) * made.count(0, entering)) / layers
        said = f"{mean / 1000:.1f} %" if layers == 28 else f"{round(mean)} of {entering}"
        assert preset.source.endswith(said)


@pytest.mark.parametrize(("depth", "cut"), [(4, 1), (8, 2), (11, 2), (12, 3), (32, 3)])
def test_first_layers_of_other_depths(depth: int, cut: int) -> None:
    assert PriorTR.options_for_depth(depth).get("prune_before", 3) == cut


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queries": "all"}, "queries='all' should be one of 'question', 'but_last', 'last'"),
        ({"heads": 3}, "heads=3 should be one of 'mean', 'max'"),
        ({"score_threshold": math.inf}, "score_threshold=inf should be in"),
        ({"cut_earlier_caches": "yes"}, "cut_earlier_caches='yes' should be"),
    ],
)
def test_refused_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        PriorTR(5, **options)
