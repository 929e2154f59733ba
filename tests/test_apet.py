"""ApET beyond the golden cases: a slow reference, the repairs, and the step inside the decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import llava, make_inputs
from torch import Tensor, nn

import tokprune
from tokprune.methods import ApET
from tokprune.operators.apet import compress, farthest_points


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slowly(x: Tensor, keep: int, basis: int) -> tuple[list[int], Tensor]:
    """Kept tokens and their vectors."""
    wide, k, n = x.double(), min(basis, keep - 1), len(x)
    points: list[int] = []
    while len(points) < k:
        if not points:
            far = [float(v.norm()) for v in wide]
        else:
            far = [min(float((v - wide[p]).norm()) for p in points) for v in wide]
        points.append(max((i for i in range(n) if i not in points), key=lambda i: far[i]))
    s = wide[points]
    weights = torch.linalg.solve(s @ s.T + 1e-5 * torch.eye(k).double(), s @ wide.T)
    errors = (wide - weights.T @ s).norm(dim=1).tolist()
    rest = sorted((i for i in range(n) if i not in points), key=lambda i: -errors[i])
    heads = rest[: keep - k]
    groups = {head: [head] for head in heads} | {point: [point] for point in points}
    for i in rest[keep - k :]:
        near = {h: float(torch.cosine_similarity(wide[i], wide[h], dim=0)) for h in heads}
        groups[max(heads, key=lambda h: near[h])].append(i)
    kept = sorted(groups)
    return kept, torch.stack([wide[groups[i]].mean(0) for i in kept]).float()


@contextmanager
def hook(layer: nn.Module, function: Callable[..., None]) -> Iterator[None]:
    handle = layer.register_forward_pre_hook(function, with_kwargs=True)
    yield
    handle.remove()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(2, 24), st.integers(0, 6), st.data())
def test_the_basis_stays_at_its_own_places(
    seed: int, n: int, basis: int, data: st.DataObject
) -> None:
    keep = data.draw(st.integers(1, n))
    x = draw(seed, 1, n, 8)
    found = compress(x, keep, basis)
    kept, out = slowly(x[0], keep, basis)
    assert found.index[0].tolist() == kept
    torch.testing.assert_close(found.out[0], out)
    assert x.gather(1, found.basis[..., None].expand(-1, -1, 8)).equal(
        found.out[0][found.group[0, found.basis[0]]][None]
    )
    members = found.group[0].bincount(minlength=keep)
    assert members.sum() == n
    assert (members >= 1).all()


def test_tokens_in_many_pieces() -> None:
    x = draw(0, 1, 1200, 4)
    kept, out = slowly(x[0], 20, 3)
    found = compress(x, 20, 3)
    assert found.index[0].tolist() == kept
    torch.testing.assert_close(found.out[0], out)


def test_equal_tokens_are_no_trouble() -> None:
    same = (40 * draw(0, 1, 1, 6)).expand(1, 12, 6)
    assert farthest_points(same, 5)[0].tolist() == [0, 1, 2, 3, 4]
    found = compress(same, 7, 5)
    assert found.index.unique().numel() == 7
    torch.testing.assert_close(found.out, same[:, :7])


def test_nothing_to_merge_leaves_all_as_it_is() -> None:
    x = draw(0, 2, 9, 4)
    assert compress(x, 9, 3).out.equal(x)
    assert not compress(x, 9, 3, write_back="door").out.equal(x)


def test_a_random_start_depends_on_the_seed_and_nothing_else() -> None:
    x = draw(0, 2, 30, 8)
    method = ApET(keep=12, start="random", seed=3)
    together = method.compress(x, 12, "door")
    for i in range(2):
        assert method.compress(x[i : i + 1], 12, "door").index[0].equal(together.index[i])
    starts = {
        int(ApET(keep=12, start="random", seed=s).compress(x, 12, "door").basis[0, 0])
        for s in range(6)
    }
    assert len(starts) > 2
    assert method.stochastic
    assert not ApET(keep=12).stochastic


@pytest.mark.parametrize("keep", [1, 7, 0.4])
def test_the_decoder_step_merges_every_image_by_itself(keep: int | float) -> None:
    """The second row ends in an image: its last token, from which the answer is read, stays."""
    model = llava()
    inputs = make_inputs(model, [[4, "image", 6], [2, "image", 3, "image"]])
    tokens = 36
    left = keep if isinstance(keep, int) else int(keep * tokens)
    seen: list[Tensor] = []

    def look(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    layer = model.model.language_model.layers[3]
    method = ApET(keep=1.0, decoder_keep=keep, prune_before=3, basis=2)
    with torch.no_grad():
        with hook(layer, look):
            model(**inputs)
        # behind the hook that drops
        with tokprune.compress(model, method), hook(layer, look):
            model(**inputs)
    before, after = seen

    def shrunk(x: Tensor, keep: int) -> Tensor:
        return compress(x[None], keep, 2).out[0]

    gap = before.shape[1] - int(inputs["attention_mask"][0].sum())
    first = before[0, gap:]
    want = torch.cat([first[:4], shrunk(first[4:40], left), first[40:]])
    torch.testing.assert_close(after[0, -len(want) :], want)
    second = before[1]
    end = [shrunk(second[41:76], left - 1)] if left > 1 else []
    want = torch.cat([second[:2], shrunk(second[2:38], left), second[38:41], *end, second[76:]])
    torch.testing.assert_close(after[1, -len(want) :], want)
    assert after.shape[1] == max(10 + left, 5 + 2 * left)


def test_presets_have_their_budget_on_average() -> None:
    for preset in ApET.presets:
        o = preset.options
        if preset.model == "llava-1.5":
            assert (16 * o["keep"] + 16 * o["decoder_keep"]) / 32 == preset.budget
        else:
            share = o["keep"] * (1 + o["decoder_keep"]) / 2
            assert share == pytest.approx(preset.budget, abs=1e-3)


def test_layers_matter_for_the_decoder_step_alone() -> None:
    model = llava()
    with tokprune.compress(model, "apet", keep=5):
        pass
    with pytest.raises(ValueError, match=r"prune_before=16 should lie between 0 and 7"):
        tokprune.patch(model, "apet", keep=5, decoder_keep=3)
    with pytest.raises(ValueError, match="decoder_keep=99 is larger than the 36"):
        tokprune.patch(model, "apet", keep=5, decoder_keep=99)
    assert ApET.options_for_depth(8) == {"prune_before": 4}
    assert ApET.options_for_depth(32) == {}
