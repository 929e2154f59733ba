"""Golden checks of centerclip: clusterings, segments in CLIP's layout, a whole tower."""

from typing import Any

import torch
from reference.clustering import kkz

import tokprune
from golden_checks.case import Case, assert_close, assert_equal
from golden_checks.towers import clip_tower
from tokprune.operators import (
    Clusterer,
    affinity,
    kmedoids,
    segment_reduce,
    spectral_clustering,
    spectral_embedding,
)

ALGORITHMS: dict[str, Any] = {"kmediods++": "kmedoids", "kmedoids++": "kmedoids"}
GRAPHS: dict[Any, Any] = {"KNN": "knn", "HeatKernel": "heat", None: "knn"}


def check_kmedoids(case: Case) -> None:
    p = case.parameters
    options = {"distance": p["distance"], "p": p["norm_p"], "pre_norm": p["pre_norm"]}
    got = kmedoids(case["x"], p["K"], sort=p["id_sort"], **options)
    assert_equal(got.medoids, case["medoids"], "medoids")
    assert_equal(got.assign, case["assign"], "assign")
    if "init_medoids" in case:
        assert_equal(kkz(case["x"], p["K"], **options), case["init_medoids"], "init_medoids")
    for i, one in enumerate(case["x"]):  # alone as in the batch
        alone = kmedoids(one, p["K"], sort=p["id_sort"], **options)
        assert_equal(alone.medoids, got.medoids[i], "medoids alone")


def check_spectral(case: Case) -> None:
    p = case.parameters
    assert p["spatial_temporal_kernels"] is None
    assert p["metric"] == "euclidean"
    graph = {"graph": GRAPHS[p["mode"]], "neighbours": p["knn_k"], "sigma": p["sigma"]}
    weights = affinity(case["x"], **graph)
    assert_close(weights, case["w"], "w")
    values, rows = spectral_embedding(weights, p["K"])
    assert_close(values.flip(-1), case["eigvals"], "eigvals", atol=1e-6)
    assert_close(rows @ rows.mT, case["q"] @ case["q"].mT, "q qᵀ", atol=1e-5)
    got = spectral_clustering(case["x"], p["K"], p=p["norm_p"], **graph)
    assert_equal(got.medoids, case["medoids"], "medoids")
    assert_equal(got.assign, case["assign"], "assign")


def check_segment_reduce(case: Case) -> None:
    p = case.parameters
    clusterer = Clusterer(
        ALGORITHMS.get(p["algorithm"], p["algorithm"]),
        graph=GRAPHS[p["graph"]], sigma=p["sigma"], neighbours=p["knn_k"],
    )  # fmt: skip
    x = case["x"].transpose(0, 1).unflatten(0, (-1, p["frames_before"]))
    assert x.shape[2] == 1 + p["tokens_before"]
    got = segment_reduce(
        x, p["segments_after"], p["clusters"], clusterer, aggregate=p["aggregation"]
    )
    assert_close(got.hidden.flatten(0, 1).transpose(0, 1), case["out"], "out")


def check_e2e_clip(case: Case) -> None:
    p = case.parameters
    clusterer = Clusterer(distance=p["distance"], p=p["norm_p"])
    pixels = case["pixel_values"].unflatten(0, (-1, p["frames"]))
    number = p["cluster_before_block_0based"]
    for attention in ("eager", "sdpa"):
        model = clip_tower(case.weights(), p["config"], attention)
        seen: list[torch.Tensor] = []
        layer = getattr(model, "vision_model", model).encoder.layers[number]

        def before(module: Any, args: Any, kwargs: Any, seen: Any = seen) -> None:
            seen.append(args[0] if args else kwargs["hidden_states"])

        handle = layer.register_forward_pre_hook(before, with_kwargs=True)
        with torch.no_grad():
            got = tokprune.reduce_frames(
                model, pixels, segments=p["segments"], keep=p["clusters"], layer=number,
                clusterer=clusterer,
            )  # fmt: skip
            handle.remove()
            again = layer.register_forward_pre_hook(before, with_kwargs=True)
            tokprune.reduce_frames(
                model, pixels, segments=p["segments"], keep=p["clusters"], clusterer=clusterer
            )  # the same layer by default
            again.remove()
        assert_close(seen[0].transpose(0, 1), case["cluster_input"], "cluster_input", atol=1e-6)
        assert_equal(seen[0], seen[1], "default layer")
        ((at, reduced),) = got.reductions
        assert at == number
        assert reduced.medoids is not None
        assert reduced.assign is not None
        assert_equal(reduced.medoids.flatten(0, 1), case["medoids"], "medoids")
        assert_equal(reduced.assign.reshape(case["assign"].shape), case["assign"], "assign")
        out = reduced.hidden.flatten(0, 1).transpose(0, 1)
        assert_close(out, case["cluster_output"], "cluster_output", atol=1e-6)
        last = got.last_hidden_state.flatten(0, 1)
        assert_close(last, case["last_hidden_state"], "last_hidden_state", atol=1e-6)


CHECKS = {
    "centerclip.kmedoids": check_kmedoids,
    "centerclip.spectral": check_spectral,
    "centerclip.segment_reduce": check_segment_reduce,
    "centerclip.e2e_clip": check_e2e_clip,
}
