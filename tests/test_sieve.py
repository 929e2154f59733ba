"""SIEVE: a slow reference of the whole, its text, underflow, several images, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import BUILDERS, make_inputs
from torch import Tensor

import tokprune
from tokprune.methods.sieve import SIEVE
from tokprune.operators import sieve as operators
from tokprune.operators.sieve import strongest_heads, text_residual, unexplained_and_diverse

CUT = 3


def reference(
    visual: Tensor, text: Tensor, rows: Tensor, keep: int, heads: int, energy: float, eps: float
) -> list[int]:
    """Token by token in float64; ``rows`` [H, M, n] attention of the text."""
    visual, text, rows = visual.double(), text.double(), rows.double()
    mass = rows.sum((1, 2)).tolist()
    used = sorted(range(len(mass)), key=lambda h: (-mass[h], h))[:heads]
    attention = sum(rows[h].sum(0) for h in used)
    assert isinstance(attention, Tensor)
    mean = text.mean(0)
    _, right, basis = torch.linalg.svd(text - mean, full_matrices=False)
    squares, total, ridge = right.square(), 0.0, 0.0
    for square in squares.tolist():
        total += square
        if total >= energy * float(squares.sum()):
            ridge = square + eps
            break
    residuals, score = [], []
    for i, token in enumerate(visual - mean):
        known = basis.T @ ((squares / (squares + ridge)) * (basis @ token))
        residuals.append(token - known)
        ratio = float(residuals[-1].norm() / token.norm())
        score.append((float(attention[i]) * ratio) ** 2)
    chosen: list[int] = []
    for _ in range(keep):
        best = max((s, -i) for i, s in enumerate(score) if i not in chosen)
        chosen.append(-best[1])
        for j in range(len(score)):
            cosine = torch.cosine_similarity(residuals[chosen[-1]], residuals[j], dim=0)
            score[j] *= 1 - float(cosine) ** 2
    return chosen


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_operators_equal_the_reference(
    monkeypatch: pytest.MonkeyPatch, dense: bool, seed: int
) -> None:
    """A batch of texts of different lengths, whose padding may hold anything."""
    if not dense:
        monkeypatch.setattr(operators, "DENSE_LIMIT", 0)
    generator = torch.Generator().manual_seed(seed)
    visual, text = (torch.randn(3, n, 24, generator=generator) for n in (40, 9))
    rows = torch.rand(3, 6, 9, 40, generator=generator).pow(4)
    words = torch.ones(3, 9, dtype=torch.bool)
    words[1, :4], words[2, :8] = False, False
    text[~words] = torch.nan
    received = rows.masked_fill(~words[:, None, :, None], 0.0).sum(2)
    attention = strongest_heads(received, 2)[1]
    found = text_residual(visual, text, 0.6, 1e-3, words)
    order = unexplained_and_diverse(found.residual, found.ratio, attention, 15)
    for b in range(3):
        real = words[b]
        want = reference(visual[b], text[b, real], rows[b, :, real], 15, 2, 0.6, 1e-3)
        assert order[b].tolist() == want


def test_one_word_explains_nothing() -> None:
    """Its span is a point: attention and the discount alone decide."""
    torch.manual_seed(0)
    visual, text = torch.randn(1, 6, 4), torch.randn(1, 1, 4)
    visual[0, 5] = text[0, 0]
    found = text_residual(visual, text)
    assert found.ratio[0].tolist() == pytest.approx([1.0] * 5 + [0.0])
    assert found.ridge.tolist() == pytest.approx([1e-6])


def test_heavy_discounts_do_not_underflow() -> None:
    """Residuals that nearly all point one way, as where one dimension outweighs all others: scores
    fall by orders of magnitude a step, soon below what float32 can hold."""
    torch.manual_seed(0)
    residual = torch.randn(1, 60, 70) * 0.02
    residual[..., 0] += 1
    attention = (torch.rand(1, 60) + 0.5) * 1e-15
    unit = torch.nn.functional.normalize(residual[0].double(), dim=-1)
    left = 1 - (unit @ unit.T).square()
    score, want = attention[0].double().square(), []
    for _ in range(40):
        want.append(int(score.argmax()))
        score = score * left[want[-1]]
        score[want] = -1
    assert 0 < score.max() < 1e-60
    got = unexplained_and_diverse(residual, torch.ones(1, 60), attention, 40)
    assert got[0].tolist() == want


def test_ties_and_copies() -> None:
    """Of equal tokens the first, and a copy of a chosen one last; zeros in order, none twice."""
    rows = torch.eye(4)[[0, 0, 1, 2]][None]
    one = torch.ones(1, 4)
    assert unexplained_and_diverse(rows, one, one, 4).tolist() == [[0, 2, 3, 1]]
    assert unexplained_and_diverse(rows, one, one * 0, 3).tolist() == [[0, 1, 2]]


def test_heads_of_each_image() -> None:
    received = torch.tensor([[[5.0, 0, 1, 9], [1, 1, 7, 0], [3, 2, 7, 0]]])
    heads, scores = strongest_heads(received, 1, torch.tensor([[0, 0, 1, -1]]), 2)
    assert heads.tolist() == [[[0], [1]]]  # of equal masses the lower head
    assert scores.tolist() == [[5, 0, 7, 0]]
    heads, scores = strongest_heads(received, 2)
    assert heads.tolist() == [[[0, 2]]]
    assert scores.tolist() == [[8, 2, 8, 9]]


PROMPTS: list[list[Any]] = [[4, "image", 6, "image", 7], [7, "image", 9], [5, "image"]]


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("family", BUILDERS)
def test_what_stays_is_that_of_the_reference(family: str, window: int | None) -> None:
    """From the model's own hidden states and attention; a prompt that ends in its image has its
    last token for text, which stays."""
    model = BUILDERS[family](attention="eager")
    inputs = make_inputs(model, PROMPTS)
    method = SIEVE(keep=8, prune_before=CUT, heads=2, energy=0.6, window=window)
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True, output_attentions=True)
        with tokprune.compress(model, method) as trace:
            model(**inputs)
    before, after = trace.last.layers[CUT - 1], trace.last.layers[CUT]
    hidden, attention = out.hidden_states[CUT], out.attentions[CUT - 1]
    for b, images in enumerate(before.counts):
        real = before.column[b] >= 0
        last = int((before.segment[b] >= 0).nonzero().max())
        text = [i for i in range(last + 1, len(real)) if real[i]][-(window or 99) :] or [last]
        for s in range(len(images)):
            own = (before.segment[b] == s).nonzero().view(-1)
            rows = attention[b][:, text][:, :, own]
            order = reference(hidden[b, own], hidden[b, text], rows, 8, 2, 0.6, 1e-6)
            want = own[order]
            if text == [last] and last not in want.tolist():
                want[-1] = last  # the answer is read from it
            kept = after.column[b][after.segment[b] == s]
            assert kept.tolist() == before.column[b][want].sort().values.tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 0}, "heads=0 should be a whole number, at least 1"),
        ({"energy": 0.0}, r"energy=0.0 should be in \(0, 1\]"),
        ({"eps": 0.0}, r"eps=0.0 should be in \(0"),
        ({"window": 0}, "window=0 should be a whole number, at least 1"),
        ({"keep": (5, 9), "prune_before": (1, 2)}, "should not rise"),
    ],
)
def test_refused_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SIEVE(**{"keep": 9, **options})


def test_operators_refuse_what_does_not_fit() -> None:
    rows, one = torch.zeros(1, 4, 3), torch.ones(1, 4)
    with pytest.raises(ValueError, match="M at least 1"):
        text_residual(rows, rows[:, :0])
    with pytest.raises(ValueError, match=r"text \(1, 4, 2\)"):
        text_residual(rows, rows[..., :2])
    with pytest.raises(ValueError, match="energy is 0"):
        text_residual(rows, rows, energy=0)
    with pytest.raises(ValueError, match="words is"):
        text_residual(rows, rows, words=one)
    with pytest.raises(ValueError, match="k is 5"):
        unexplained_and_diverse(rows, one, one, 5)
    with pytest.raises(ValueError, match=r"ratio \(4,\)"):
        unexplained_and_diverse(rows, one[0], one, 2)
    with pytest.raises(ValueError, match="heads is 5"):
        strongest_heads(rows, 5)
    with pytest.raises(ValueError, match="received has shape"):
        strongest_heads(one, 1)
