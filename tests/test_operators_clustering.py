"""Properties of the clustering operators and of segments of video frames."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_tensors import few, normal, seeds
from reference.clustering import kkz, kmedoids_by_hand
from torch import Tensor

from tokprune import operators as ops
from tokprune.operators import Clusterer, kmedoids, pairwise, segment_reduce


@st.composite
def sizes(draw: Any) -> tuple[int, int]:
    n = draw(st.integers(1, 24))
    return n, draw(st.integers(1, n))


# ------------------------------------------------------------------------------ k-medoids


@few
@given(seeds, sizes(), st.sampled_from([("euclidean", 2.0), ("euclidean", 1.0), ("cosine", 2.0)]))
def test_kmedoids_equals_the_loop_written_one(
    seed: int, size: tuple[int, int], kind: tuple[str, float]
) -> None:
    n, k = size
    x = normal(seed, 2, n, 5)
    distance: Any = kind[0]
    got = kmedoids(x, k, distance=distance, p=kind[1], iterations=50)
    for row, one in enumerate(x):
        medoids, clusters = kmedoids_by_hand(one, k, *kind)
        assert got.medoids[row].tolist() == medoids
        assert [(got.assign[row] == c).nonzero().flatten().tolist() for c in range(k)] == clusters


@few
@given(seeds, sizes(), st.booleans(), st.integers(1, 12))
def test_clusters_are_never_empty_and_hold_their_medoid(
    seed: int, size: tuple[int, int], pre_norm: bool, iterations: int
) -> None:
    n, k = size
    # few different values: many duplicates and ties
    x = normal(seed, 3, n, 2).round()
    got = kmedoids(x, k, pre_norm=pre_norm, iterations=iterations)
    assert got.medoids.dtype == got.assign.dtype == torch.long
    assert (got.medoids.diff(dim=-1) > 0).all()
    assert torch.equal(got.assign.gather(1, got.medoids), torch.arange(k).expand(3, k))
    assert set(got.assign.unique().tolist()) <= set(range(k))
    if k == n:
        assert torch.equal(got.medoids, torch.arange(n).expand(3, n))


@few
@given(seeds, sizes())
def test_every_token_is_with_its_nearest_medoid(seed: int, size: tuple[int, int]) -> None:
    x = normal(seed, 1, size[0], 4)
    got = kmedoids(x, size[1])
    far = torch.cdist(x.double(), x.double())[0]
    near = far[:, got.medoids[0]]
    chosen = near.gather(1, got.assign[0][:, None])[:, 0]
    torch.testing.assert_close(chosen, near.amin(1))


@few
@given(seeds, sizes())
def test_a_sample_does_not_depend_on_its_batch(seed: int, size: tuple[int, int]) -> None:
    x = normal(seed, 4, size[0], 6)
    together = kmedoids(x, size[1])
    turned = kmedoids(x.flip(0), size[1])
    assert torch.equal(turned.medoids.flip(0), together.medoids)
    for i in range(4):
        assert torch.equal(kmedoids(x[i], size[1]).medoids, together.medoids[i])


@few
@given(seeds, sizes(), st.floats(0.01, 100))
def test_scale_and_rotation_change_nothing(seed: int, size: tuple[int, int], scale: float) -> None:
    x = normal(seed, size[0], 6)
    turn = torch.linalg.qr(normal(seed + 1, 6, 6).double()).Q
    got = kmedoids((x.double() @ turn * scale).float(), size[1])
    assert torch.equal(got.medoids, kmedoids(x, size[1]).medoids)


def test_the_earlier_of_a_pair_stays() -> None:
    """Two frames that differ by noise: pairs tie exactly, and the first frame's token wins."""
    frame = 10 * normal(0, 25, 16)
    noise = 0.01 * normal(1, 25, 16)
    got = kmedoids(torch.cat([frame, frame + noise]), 25)
    paired = torch.arange(25).repeat(2)
    assert torch.equal(got.assign, paired)
    assert torch.equal(got.medoids, torch.arange(25))


def test_still_frames_keep_the_first() -> None:
    frame = normal(0, 30, 8)
    got = kmedoids(frame.repeat(4, 1), 30)
    assert torch.equal(got.medoids, torch.arange(30))
    assert torch.equal(got.assign, torch.arange(30).repeat(4))


def test_one_point_many_times() -> None:
    got = kmedoids(torch.ones(2, 7, 3), 3)
    assert torch.equal(got.medoids, torch.tensor([0, 1, 2]).expand(2, 3))
    assert torch.equal(got.assign[0], torch.tensor([0, 1, 2, 0, 0, 0, 0]))


def test_one_cluster_has_the_central_point() -> None:
    x = torch.tensor([[0.0], [1.0], [5.0], [6.0], [100.0]])
    got = kmedoids(x, 1)
    assert got.medoids.tolist() == [2]
    assert got.assign.tolist() == [0] * 5


def test_more_rounds_change_nothing() -> None:
    x = normal(3, 4, 200, 16)
    assert torch.equal(kmedoids(x, 40).medoids, kmedoids(x, 40, iterations=100).medoids)


def test_kkz_starts_with_the_longest_and_goes_far() -> None:
    x = torch.tensor([[3.0, 0.0], [0.0, 4.0], [-1.0, 0.0], [0.0, 3.9]])
    assert kkz(x[None], 3).tolist() == [[1, 0, 2]]
    # one round from this start, numbered as chosen
    got = kmedoids(x, 3, sort=False, iterations=1)
    assert got.medoids.tolist() == [1, 0, 2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_clustered_in_full(dtype: torch.dtype) -> None:
    x = normal(5, 2, 60, 32).to(dtype)
    got, want = kmedoids(x, 12), kmedoids(x.float(), 12)
    assert torch.equal(got.medoids, want.medoids)
    assert torch.equal(got.assign, want.assign)


@few
@given(seeds, st.sampled_from(["euclidean", "cosine"]), st.floats(0, 1e4))
def test_distances_are_exact_for_near_duplicates(seed: int, kind: Any, offset: float) -> None:
    """Small differences far from the origin, where a float32 Gram matrix has none left."""
    x = normal(seed, 1, 12, 64) * 1e-2 + offset
    got = pairwise(x, kind)
    y = x.double()
    if kind == "cosine":
        y = torch.nn.functional.normalize(y, dim=-1)
    want = torch.cdist(y, y, compute_mode="donot_use_mm_for_euclid_dist")
    want = want.square() / 2 if kind == "cosine" else want
    assert torch.equal(got, got.mT)
    assert (got.diagonal(dim1=1, dim2=2) == 0).all()
    scale = 1.0 if kind == "cosine" else y.norm(dim=-1).max().item()
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-7 * scale)


# ------------------------------------------------------------------------------ spectral


def blobs(seed: int, k: int, members: int) -> tuple[Tensor, Tensor]:
    """k far blobs, members interleaved, and the blob of each point."""
    home = torch.arange(k).repeat(members)
    centre = 40 * normal(seed, k, 6)
    return centre[home] + 0.3 * normal(seed + 1, k * members, 6), home


@few
@given(seeds, st.integers(2, 5), st.integers(2, 6), st.sampled_from(["knn", "heat"]))
def test_separate_blobs_are_found(seed: int, k: int, members: int, graph: Any) -> None:
    x, home = blobs(seed, k, members)
    got = ops.spectral_clustering(x, k, graph=graph, neighbours=members)
    same = got.assign[:, None] == got.assign[None, :]
    assert torch.equal(same, home[:, None] == home[None, :])
    assert torch.equal(got.assign[got.medoids], torch.arange(k))


@few
@given(seeds, st.integers(1, 8), st.one_of(st.none(), st.floats(0.5, 5)))
def test_affinity(seed: int, neighbours: int, sigma: float | None) -> None:
    x = normal(seed, 2, 9, 4)
    full = ops.affinity(x, graph="heat", sigma=sigma)
    knn = ops.affinity(x, neighbours=neighbours, sigma=sigma)
    assert torch.equal(knn, knn.mT)
    assert (knn.diagonal(dim1=1, dim2=2) == 1).all()
    for b in range(2):
        far = torch.cdist(x[b].double(), x[b].double())
        width = far.square().mean() / 4 if sigma is None else torch.tensor(float(sigma) ** 2)
        torch.testing.assert_close(
            full[b].double(), torch.exp(-far.square() / 2 / width), rtol=1e-4, atol=1e-7
        )
        closest = far.argsort(dim=1)[:, :neighbours]
        for i in range(9):
            for j in range(9):
                linked = j in closest[i].tolist() or i in closest[j].tolist()
                assert knn[b, i, j] == (full[b, i, j] if linked else 0)


@few
@given(seeds, st.integers(1, 9))
def test_spectral_rows_span_the_smallest_eigenvectors(seed: int, k: int) -> None:
    weights = ops.affinity(normal(seed, 9, 4), graph="heat")
    values, rows = ops.spectral_embedding(weights, k)
    assert rows.shape == (9, k)
    torch.testing.assert_close(rows.norm(dim=-1), torch.ones(9))
    assert values[0].abs() < 1e-6  # the constant vector, scaled by degree
    degree = weights.double().sum(-1)
    laplacian = torch.eye(9).double() - weights / (degree[:, None] * degree[None, :]).sqrt()
    torch.testing.assert_close(values.double(), torch.linalg.eigvalsh(laplacian), atol=1e-6, rtol=0)


def test_scale_free_width_sees_what_two_cannot() -> None:
    """Features far apart: with σ = 2 all weights vanish, with σ = None none does."""
    x, home = blobs(0, 4, 5)
    fixed = ops.affinity(100 * x, graph="heat", sigma=2.0)
    assert torch.equal(fixed, torch.eye(20))
    got = ops.spectral_clustering(100 * x, 4, graph="knn", neighbours=5, sigma=None)
    assert torch.equal(got.assign[:, None] == got.assign, home[:, None] == home)
    assert torch.isfinite(ops.affinity(torch.ones(1, 5, 3), sigma=None)).all()


def test_neighbourhood_in_space_and_time() -> None:
    near = ops.neighbourhood(4, (3, 5), spatial=3, temporal=2)
    assert near.shape == (60, 60)
    for i in range(60):
        for j in range(60):
            a, b = (divmod(t, 15) for t in (i, j))
            (y, x), (v, u) = divmod(a[1], 5), divmod(b[1], 5)
            want = abs(a[0] - b[0]) <= 1 and abs(y - v) <= 1 and abs(x - u) <= 1
            assert bool(near[i, j]) == want


def test_published_neighbours() -> None:
    assert ops.auto_neighbours(3, 49) == 15
    assert ops.auto_neighbours(3, 196) == 20


# ------------------------------------------------------------------------------ segments


@given(st.integers(1, 40), st.integers(1, 40))
def test_segment_bounds_cover_the_video(frames: int, segments: int) -> None:
    if segments > frames:
        with pytest.raises(ValueError, match=f"segments is {segments}"):
            ops.segment_bounds(frames, segments)
        return
    bounds = ops.segment_bounds(frames, segments)
    assert len(bounds) == segments
    assert [b[0] for b in bounds] == [0, *(b[1] for b in bounds[:-1])]
    assert bounds[-1][1] == frames
    assert {b[1] - b[0] for b in bounds[:-1]} <= {frames // segments}


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6).map(sorted), st.data())
def test_segment_budgets_add_up(sizes: list[int], data: Any) -> None:
    total = data.draw(st.integers(len(sizes), sum(sizes)))
    budgets = ops.segment_budgets(total, sizes)
    assert sum(budgets) == total
    assert all(1 <= b <= s for b, s in zip(budgets, sizes))
    if total <= len(sizes) * sizes[0]:  # nobody is full
        assert budgets == [
            total // len(sizes) + (i < total % len(sizes)) for i in range(len(sizes))
        ]


@given(st.integers(1, 50), st.integers(1, 50))
def test_sparse_positions(n: int, k: int) -> None:
    if k > n:
        with pytest.raises(ValueError, match=f"k is {k}"):
            ops.sparse_positions(n, k)
        return
    at = ops.sparse_positions(n, k)
    assert at == sorted(set(at))
    assert at[0] >= 0
    assert at[-1] < n
    assert (at == list(range(n))) == (k == n)


@few
@given(seeds, st.integers(1, 7), st.integers(1, 7), st.booleans(), st.data())
def test_segment_reduce_clusters_each_segment_alone(
    seed: int, frames: int, segments: int, class_token: bool, data: Any
) -> None:
    segments = min(segments, frames)
    n, c = 5, int(class_token)
    k = data.draw(st.integers(1, n * (frames // segments)))
    mean = data.draw(st.booleans())
    x = normal(seed, 2, frames, c + n, 4)
    got = segment_reduce(
        x, segments, k, class_token=class_token, aggregate="mean" if mean else None
    )
    assert got.hidden.shape == (2, segments, c + k, 4)
    assert got.medoids is not None
    assert got.assign is not None
    for b in range(2):
        for s, (start, stop) in enumerate(ops.segment_bounds(frames, segments)):
            own = x[b, start:stop]
            tokens = own[:, c:].reshape(-1, 4)
            medoids, clusters = kmedoids_by_hand(tokens, k)
            assert got.medoids[b, s].tolist() == medoids
            for number, members in enumerate(clusters):
                want = tokens[members].mean(0) if mean else tokens[medoids[number]]
                torch.testing.assert_close(got.hidden[b, s, c + number], want)
                home = got.assign[b, start:stop].flatten()
                assert (home == number).nonzero().flatten().tolist() == members
            if class_token:
                torch.testing.assert_close(got.hidden[b, s, 0], own[:, 0].mean(0))


def test_keeping_everything_is_the_frames_themselves() -> None:
    x = normal(0, 2, 3, 10, 4)
    got = segment_reduce(x, 3, 9)
    assert torch.equal(got.hidden, x)


def test_pooling_and_sparse_sampling() -> None:
    x = normal(0, 2, 7, 10, 4)
    pooled = segment_reduce(x, 3, 9, Clusterer("pooling"))
    assert pooled.medoids is None
    for s, (start, stop) in enumerate([(0, 2), (2, 4), (4, 7)]):
        torch.testing.assert_close(pooled.hidden[:, s], x[:, start:stop].mean(1))
    sparse = segment_reduce(x, 3, 4, Clusterer("sparse_sampling"))
    assert sparse.medoids is not None
    assert sparse.medoids[0].tolist() == [[2, 6, 11, 15], [2, 6, 11, 15], [3, 10, 16, 23]]
    assert torch.equal(sparse.hidden[1, 0, 1], x[1, 0, 1 + 2])
    assert torch.equal(sparse.hidden[1, 1, 4], x[1, 3, 1 + 6])
    assert sparse.assign is not None
    assert sparse.assign[0, :2].flatten().tolist() == [0] * 6 + [1] * 5 + [2] * 4 + [3] * 3


def test_spectral_segments_link_neighbours_only() -> None:
    """A window of one cell and one frame leaves every token alone: clusters are single tokens."""
    x = normal(0, 1, 2, 4, 3)
    free = segment_reduce(x, 1, 8, Clusterer("spectral"), class_token=False, grid=(2, 2))
    assert torch.equal(free.hidden[0, 0], x.flatten(0, 2))
    got = segment_reduce(
        x, 1, 3, Clusterer("spectral", graph="heat", window=(1, 7)), class_token=False, grid=(2, 2)
    )
    # only the two frames of one cell are linked
    assert got.assign is not None
    assert torch.equal(got.assign[0, 0], got.assign[0, 1])
    with pytest.raises(ValueError, match=r"needs the places of the 4 tokens.*grid is None"):
        segment_reduce(x, 1, 3, Clusterer("spectral", window=(1, 1)), class_token=False)


def test_gradients_flow_through_what_is_kept() -> None:
    x = normal(0, 1, 4, 7, 3).requires_grad_()
    got = segment_reduce(x, 2, 3)
    got.hidden.sum().backward()
    assert got.medoids is not None
    assert x.grad is not None
    kept = (x.grad[0, :, 1:].sum(-1) > 0).reshape(2, 12)
    for s in range(2):
        assert kept[s].nonzero().flatten().tolist() == got.medoids[0, s].tolist()
    assert (x.grad[0, :, 0] == 0.5).all()


# ------------------------------------------------------------------------------ temporal


@few
@given(seeds, st.integers(1, 6), st.integers(1, 7), st.data())
def test_evs_keeps_the_first_frame_and_what_changed_most(
    seed: int, frames: int, n: int, data: Any
) -> None:
    k = data.draw(st.integers(n, frames * n))
    x = normal(seed, 2, frames, n, 3)
    x[1, :, 0] = x[1, :1, 0]  # a place that never changes
    kept = ops.evs(x, k)
    assert kept.shape == (2, k)
    assert (kept.diff(dim=-1) > 0).all()
    assert torch.equal(kept[:, :n], torch.arange(n).expand(2, n))
    for b in range(2):
        change = {}
        for t in range(1, frames):
            for place in range(n):
                u, v = x[b, t, place].double(), x[b, t - 1, place].double()
                same = torch.equal(u, v)
                change[t * n + place] = 0.0 if same else 1 - float(u @ v / u.norm() / v.norm())
        wanted = sorted(change, key=lambda i: -change[i])[: k - n]
        assert kept[b, n:].tolist() == sorted(wanted)


def test_unchanged_tokens_stay_in_order() -> None:
    x = normal(0, 4, 2).expand(5, 4, 2)
    assert ops.evs(x, 7).tolist() == list(range(7))
    change = ops.temporal_change(x)
    assert change[0].isinf().all()
    assert (change[1:] == 0).all()


@pytest.mark.parametrize(
    ("keep", "want"), [(1.0, 40), (0.3, 12), (0.1, 10), (25, 25), (3, 10), (99, 40), (1 - 0.7, 12)]
)
def test_evs_count(keep: float, want: int) -> None:
    assert ops.evs_count(keep, 4, 10) == want


# ------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kmedoids(torch.ones(3), 1), r"x has shape \(3,\)"),
        (lambda: kmedoids(torch.ones(3, 2), 0), "k is 0; it should be between 1 and .* 3"),
        (lambda: kmedoids(torch.ones(3, 2), 4), "k is 4"),
        (lambda: kmedoids(torch.ones(3, 2), 2, iterations=0), "iterations is 0"),
        (lambda: kmedoids(torch.ones(3, 2), 2, distance="l1"), "distance='l1' is unknown"),
        (lambda: kmedoids(torch.ones(3, 2), 2, p=0), "p is 0"),
        (
            lambda: ops.k_center_from_distance(torch.ones(3, 2), 1, torch.tensor(0)),
            "distance has shape",
        ),
        (lambda: ops.affinity(torch.ones(3)), r"x has shape \(3,\)"),
        (lambda: ops.affinity(torch.ones(3, 2), graph="full"), "graph='full' is unknown"),
        (lambda: ops.affinity(torch.ones(3, 2), neighbours=0), "neighbours is 0"),
        (lambda: ops.affinity(torch.ones(3, 2), sigma=0), "sigma is 0"),
        (lambda: ops.affinity(torch.ones(3, 2), near=torch.ones(2, 2).bool()), "near is"),
        (lambda: ops.spectral_embedding(torch.ones(3, 2), 1), "weights has shape"),
        (lambda: ops.spectral_embedding(torch.ones(3, 3), 4), "k is 4"),
        (lambda: Clusterer("dbscan"), "algorithm='dbscan' is unknown"),
        (lambda: Clusterer(p=-1), "p=-1 should be positive"),
        (lambda: Clusterer(sigma=0), "sigma=0 should be positive"),
        (lambda: Clusterer(neighbours=0), "neighbours=0"),
        (lambda: Clusterer(iterations=0), "iterations=0"),
        (lambda: Clusterer("pooling")(torch.ones(4, 2), 2), "has no medoids"),
        (lambda: segment_reduce(torch.ones(4, 5, 2), 1, 1), "x has shape"),
        (lambda: segment_reduce(torch.ones(1, 4, 5, 2), 5, 1), "segments is 5"),
        (lambda: segment_reduce(torch.ones(1, 4, 5, 2), 2, 9), "between 1 and the 8 tokens"),
        (lambda: segment_reduce(torch.ones(1, 4, 5, 2), 2, 3, Clusterer("pooling")), "k is 3.*4"),
        (lambda: segment_reduce(torch.ones(1, 4, 5, 2), 2, 3, aggregate="max"), "aggregate='max'"),
        (
            lambda: segment_reduce(
                torch.ones(1, 4, 5, 2), 2, 3, Clusterer("sparse_sampling"), aggregate="mean"
            ),
            "needs clusters",
        ),
        (lambda: ops.segment_budgets(2, [4, 4, 4]), "total is 2"),
        (lambda: ops.evs(torch.ones(4, 2), 1), "x has shape"),
        (lambda: ops.evs(torch.ones(3, 4, 2), 3), "k is 3; it should be between 4"),
        (lambda: ops.evs(torch.ones(3, 4, 2), 13), "k is 13"),
        (lambda: ops.evs_count(1.5, 3, 4), "keep=1.5"),
        (lambda: ops.evs_count(0, 3, 4), "keep=0"),
        (lambda: ops.evs_count(4, 0, 4), "frames=0"),
    ],
)
def test_bad_input(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
