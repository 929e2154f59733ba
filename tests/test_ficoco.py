"""FiCoCo: both stages against slow versions with whole maps and loops, budgets, errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import BUILDERS
from torch import Tensor

import tokprune
from tokprune.engine.contracts import Attention, SequenceView, TowerInput, TowerTokens
from tokprune.engine.model import TowerFacts
from tokprune.methods.ficoco import FiCoCo
from tokprune.methods.ficoco.decoder import DecoderMerge
from tokprune.methods.ficoco.encoder import EncoderMerge
from tokprune.operators.ficoco import most_targets, penalise, soft_targets

HEADS, WIDTH = 4, 3


def _attention(batch: int, length: int, causal: bool) -> Attention:
    query = torch.randn(batch, HEADS, length, WIDTH)
    key = torch.randn(batch, HEADS // 2 if causal else HEADS, length, WIDTH)
    return Attention(query, key, key, 0.7, causal=causal)


def _map(attention: Attention, row: int) -> list[list[float]]:
    """Logits of a sample, averaged over the heads."""
    query, key = attention.query[row].double(), attention.key[row].double()
    key = key.repeat_interleave(len(query) // len(key), dim=0)
    return (0.7 * query @ key.mT).mean(0).tolist()  # type: ignore[no-any-return]


def _merge(
    hidden: dict[int, Tensor], merged: list[int], correlation: Any, quantile: float
) -> dict[int, int]:
    """Merge in place; the strongest target of every merged token."""
    kept = [j for j in hidden if j not in merged]
    total, weight = {j: hidden[j].clone() for j in kept}, dict.fromkeys(kept, 1.0)
    holder = {}
    for i in merged:
        row = {j: correlation(i, j) for j in kept}
        threshold = torch.tensor(list(row.values())).double().quantile(quantile)
        holder[i] = max(kept, key=row.__getitem__)
        targets = [j for j in kept if row[j] > threshold] or [holder[i]]
        shares = {j: math.exp(row[j] - row[holder[i]]) for j in targets}
        for j in targets:
            share = shares[j] / sum(shares.values())
            total[j] += share * hidden[i]
            weight[j] += share
    hidden.clear()
    hidden.update({j: total[j] / weight[j] for j in kept})
    return holder


@pytest.mark.parametrize("cls", [True, False])
def test_encoder_stage(cls: bool) -> None:
    """Two cuts of two images: own state each, the class token in front, places on an odd grid."""
    torch.manual_seed(0)
    side, removed, beta, quantile = 5, {0: 6, 1: 5}, 0.35, 0.8
    n, first = side * side, int(cls)
    facts = TowerFacts(4, 2, (side, side), n, cls, False)
    method = FiCoCo(r=6, quantile=quantile)
    run: Any = EncoderMerge(method, removed).start(TowerInput(facts, (0, 1), torch.device("cpu")))
    hidden = torch.randn(2, first + n, 8)
    slots = torch.arange(-first, n).expand(2, -1)
    states = [dict(enumerate(hidden[b, first:].double())) for b in range(2)]
    closed: list[set[int]] = [set(), set()]
    for layer, r in removed.items():
        attention = _attention(2, slots.shape[1], causal=False)
        tokens = TowerTokens(cls, slots, slots.new_zeros(2, n), [slots.shape[1]] * 2)
        run.attention(layer, attention, tokens)
        answer = run.between(layer, hidden, tokens)
        for b in range(2):
            a = _map(attention, b)
            row_of = {slot: i for i, slot in enumerate(slots[b].tolist()) if slot >= 0}
            alive = list(states[b])
            rows = [row_of[s] for s in alive]
            among = [sum(a[i][j] for j in rows) / len(rows) for i in rows]
            noted = [a[0][i] if cls else sum(a[j][i] for j in rows) / len(rows) for i in rows]
            scale = [math.sqrt(sum(x * x for x in v)) for v in (noted, among)]
            score = {
                s: beta * c / scale[0] - (1 - beta) * p / scale[1]
                for s, c, p in zip(alive, noted, among)
            }
            windows: dict[tuple[int, int], list[int]] = {}
            for s in alive:
                if s not in closed[b]:
                    windows.setdefault((s // side // 2, s % side // 2), []).append(s)
            for cells in windows.values():
                least = min(cells, key=score.__getitem__)
                score[least] *= 0.5 if score[least] > 0 else 2
                closed[b].add(least)
            merged = sorted(alive, key=score.__getitem__)[:r]
            holder = _merge(
                states[b], merged, lambda i, j, a=a, at=row_of: a[at[i]][at[j]], quantile
            )
            new = slots[b].gather(0, answer.rows[b])
            assert new[first:].tolist() == list(states[b])
            assert answer.rows[b, :first].tolist() == [0] * first
            want = torch.stack(list(states[b].values())).float()
            torch.testing.assert_close(answer.hidden[b, first:], want, atol=1e-4, rtol=1e-4)
            for i, j in holder.items():
                assert new[answer.group[b, row_of[i]]] == j
            assert new[answer.group[b]].tolist() == [holder.get(s, s) for s in slots[b].tolist()]
        torch.testing.assert_close(answer.hidden[:, :first], hidden[:, :first])
        slots, hidden = slots.gather(1, answer.rows), answer.hidden


#: number of the image or −1, token by token; "." is padding
LAYOUTS = ["..-000000--1111---", "-00000000000000000", "--00000-11111111--", "------------------"]


def test_decoder_stage() -> None:
    """One cut of a ragged batch: two images, padding, an image at the end, and no image."""
    torch.manual_seed(1)
    gamma, alpha, quantile, r = 0.6, 0.6, 0.8, 3
    length = len(LAYOUTS[0])
    segment = torch.tensor([[-1 if c in ".-" else int(c) for c in row] for row in LAYOUTS])
    column = torch.tensor([[-1 if c == "." else i for i, c in enumerate(row)] for row in LAYOUTS])
    texts = [len(row) - len(row.rstrip("-")) if "0" in row else length for row in LAYOUTS]
    after = torch.arange(length) >= length - torch.tensor(texts)[:, None]
    counts = [[row.count(c) for c in "01" if c in row] for row in LAYOUTS]
    sequence = SequenceView(
        column, column, segment, after, counts, counts, texts, [length] * 4, slot=column
    )
    attention, hidden = _attention(4, length, causal=True), torch.randn(4, length, 8)
    run: Any = DecoderMerge(FiCoCo(r=r, place="decoder", quantile=quantile), (2, 3)).start()
    run.attention(2, attention, sequence)
    answer = run.before_layer(3, hidden, sequence, None)
    assert answer.counts == [[max(1, n - r) for n in row] for row in counts]
    want_hidden, want_mask = hidden.clone(), segment >= 0
    want_group = torch.arange(length).repeat(4, 1)
    for b in range(len(LAYOUTS)):
        a = _map(attention, b)
        text = list(range(length - texts[b], length))
        for s in range(len(counts[b])):
            own = (segment[b] == s).nonzero().view(-1).tolist()
            score = {
                i: gamma * sum(a[i][j] for j in own)
                - (1 - gamma) * sum(a[t][i] for t in text) / max(1, len(text))
                for i in own
                if i != length - 1  # the answer is read there
            }
            merged = sorted(score, key=score.__getitem__, reverse=True)[: min(r, len(own) - 1)]

            def correlation(i: int, j: int, a: Any = a, text: Any = text) -> float:
                path = sum(a[t][i] * a[t][j] for t in text)
                return alpha * a[i][j] + (1 - alpha) * path  # type: ignore[no-any-return]

            state = {i: hidden[b, i].double() for i in own}
            holder = _merge(state, merged, correlation, quantile)
            want_mask[b, merged] = False
            for i, x in state.items():
                want_hidden[b, i] = x.float()
            for i, j in holder.items():
                want_group[b, i] = j
    assert torch.equal(answer.mask, want_mask)
    assert torch.equal(answer.group, want_group)
    alive = want_mask | (segment < 0)
    torch.testing.assert_close(answer.hidden[alive], want_hidden[alive], atol=1e-4, rtol=1e-4)


@given(st.integers(1, 60), st.floats(0, 1), st.integers(0, 2**16))
def test_targets_are_those_above_the_quantile(columns: int, quantile: float, seed: int) -> None:
    rows = torch.randn(1, 3, columns, generator=torch.Generator().manual_seed(seed))
    targets, shares = soft_targets(rows, None, quantile, most_targets(columns, quantile))
    above = (rows > rows.quantile(quantile, dim=2, keepdim=True)).sum(2).clamp(min=1)
    assert (shares > 0).sum(2).tolist() == above.tolist()
    torch.testing.assert_close(shares.sum(2), torch.ones(1, 3))
    assert torch.equal(targets[..., 0], rows.argmax(2))


def test_penalty_chooses_each_cell_once() -> None:
    score, cell = torch.tensor([[4.0, 3.0, -2.0, -1.0]]), torch.tensor([[0, 1, 4, -1]])
    closed = torch.zeros(1, 9, dtype=torch.bool)
    first, closed = penalise(score, cell, closed, (3, 3))
    assert first.tolist() == [[4.0, 3.0, -4.0, -1.0]]  # cells 0, 1 and 4 are one window
    second, closed = penalise(score, cell, closed, (3, 3))
    assert second.tolist() == [[4.0, 1.5, -2.0, -1.0]]
    assert closed.nonzero()[:, 1].tolist() == [1, 4]


def test_budgets() -> None:
    assert FiCoCo.preset("llava-1.5", 114).counts(576, 11)[-1] == 114
    assert FiCoCo(r=200).counts(576, 4) == (376, 176, 1, 1)
    assert FiCoCo(keep=100).counts(576, 4) == (457, 338, 219, 100)
    assert FiCoCo(keep=1.0).counts(9, 2) == (9, 9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of keep and r; got none"),
        ({"keep": 5, "r": 2}, "exactly one of keep and r"),
        ({"keep": 5, "first": 99}, "first=99 should be at most 4, the last layer .* encoder"),
        ({"keep": 5, "first": 7, "place": "decoder"}, "first=7 should be at most 6.* decoder"),
        ({"keep": 5, "quantile": 1.1}, "quantile=1.1"),
    ],
)
def test_refused_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokprune.patch(BUILDERS["llava"](), "ficoco", **options)
