"""V²Drop: budgets, the score against the model's own hidden states, half precision, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import BUILDERS, make_inputs

import tokprune
from tokprune.methods.v2drop import V2Drop
from tokprune.operators.v2drop import variation

PROMPTS = [[4, "image", 6, "image", 2], [7, "image", 9]]


@pytest.mark.parametrize(("budget", "mean"), [("50/50/100%", 202.8), (192, 192), (128, 128)])
def test_presets_have_their_mean_over_the_layers(budget: Any, mean: float) -> None:
    method = V2Drop.preset("llava-1.5", budget)
    left = [576]
    for step in range(3):
        left.append(method.count(step, 576, left[-1]))
    lengths = [b - a for a, b in zip((0, *method.steps), (*method.steps, 32))]
    assert left[-1] == 1
    found = sum(n * tokens for n, tokens in zip(lengths, left)) / 32
    assert found == pytest.approx(mean, abs=0.15)


def test_counts() -> None:
    ratios = {"ratios": (0.6, 0.0), "prune_before": (1, 3)}
    assert V2Drop(**ratios).count(0, 99, 37) == 22  # of what is there, not of what entered
    assert V2Drop(**ratios).count(1, 99, 13) == 1
    assert V2Drop(**ratios, drop_all=True).count(1, 99, 13) == 0
    assert V2Drop(**ratios).count(1, 99, 0) == 0
    small = V2Drop(ratios=(0.01,), prune_before=1, drop_all=True)
    assert small.count(0, 99, 13) == 1
    kept = V2Drop(keep=(0.5, 7, 0), prune_before=(1, 2, 3))
    assert [kept.count(step, 30, 10) for step in range(3)] == [10, 7, 0]
    assert V2Drop(keep=0.125).count(1, 576, 288) == 144


def test_changes_are_those_of_the_unpruned_model() -> None:
    """Before the first cut nothing is different: the largest changes of hidden states that the
    model itself reports stay, image by image."""
    model = BUILDERS["llava"]()
    inputs = make_inputs(model, PROMPTS)
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
        with tokprune.compress(model, V2Drop(ratios=(0.3,), prune_before=3)) as trace:
            model(**inputs)
    change = (states[3] - states[2]).double().square().sum(-1)
    before, after = trace.last.layers[2], trace.last.layers[3]
    for b, images in enumerate(before.counts):
        for s in range(len(images)):
            own = (before.segment[b] == s).nonzero().view(-1)
            best = own[change[b, own].argsort(descending=True)[: int(36 * 0.3)]]
            kept = after.column[b][after.segment[b] == s]
            assert kept.tolist() == before.column[b][best].sort().values.tolist()


def test_massive_entries_do_not_overflow() -> None:
    before = torch.zeros(1, 3, 4, dtype=torch.float16)
    after = before.clone()
    after[0, 1, 0], after[0, 2, 0] = 3e4, 6e4
    assert variation(before, after).tolist() == [[0.0, 30000.0, 60000.0]]
    assert variation(-after, after)[0, 2] > 65504  # the difference itself is beyond float16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratios": (0.5, 0.5)}, r"ratios=\(0.5, 0.5\) should hold one ratio per layer .*, 3 in"),
        ({"ratios": (0.5, 1.5, 0.0)}, r"ratios\[1\]=1.5 should be in \[0, 1\]"),
        ({"ratios": 0.5}, r"ratios=0.5 should be a sequence"),
        ({"prune_before": (0, 3, 5)}, r"prune_before=\(0, 3, 5\) .* from 1 on"),
        ({"keep": (3, 5, 0)}, r"keep=\(3, 5, 0\) should not rise"),
    ],
)
def test_refused_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        V2Drop(**options)


def test_operator_refuses_other_tokens() -> None:
    with pytest.raises(ValueError, match=r"after has shape \(1, 3, 4\) and before \(1, 2, 4\)"):
        variation(torch.zeros(1, 2, 4), torch.zeros(1, 3, 4))
