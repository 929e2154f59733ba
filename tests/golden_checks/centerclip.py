"""Golden checks of centerclip: clusterings, segments in CLIP's layout, a whole tower."""

import math
import re
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
    neighbourhood,
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
    case.equal(got.medoids, "medoids")
    case.equal(got.assign, "assign")
    case.equal(kkz(case["x"], p["K"], **options), "init_medoids")
    for i, one in enumerate(case["x"]):  # alone as in the batch
        alone = kmedoids(one, p["K"], sort=p["id_sort"], **options)
        assert_equal(alone.medoids, got.medoids[i], "medoids alone")


def _near(case: Case) -> torch.Tensor | None:
    """Pairs of tokens that may be linked: ours, compared with the recorded ones, where the frames
    are known; as recorded where they are not."""
    kernels = case.parameters.get("spatial_temporal_kernels")
    if kernels is None:
        return None
    named = re.search(r"_t(\d+)_n\d+", case.path.stem)
    frames = case.parameters.get("frames") or (int(named[1]) if named else None)
    tokens = case["x"].shape[-2]
    if frames is None:
        return case["st_graph"].view(tokens, tokens) > 0
    side = math.isqrt(tokens // frames)
    near = neighbourhood(frames, (side, side), *kernels)
    if (want := case.output("st_graph")) is not None:
        assert_equal(near, want.view(tokens, tokens).bool(), "st_graph")
    return near


def check_spectral(case: Case) -> None:
    p = case.parameters
    graph = {"graph": GRAPHS[p["mode"]], "neighbours": p["knn_k"], "sigma": p["sigma"]}
    graph |= {"near": _near(case)}
    weights = affinity(case["x"], **graph)
    case.close(weights, "w")
    values, rows = spectral_embedding(weights, p["K"])
    case.close(values.flip(-1), "eigvals", atol=1e-6)
    if (q := case.output("q")) is not None:
        assert_close(rows @ rows.mT, q @ q.mT, "q qᵀ", atol=1e-5)
    got = spectral_clustering(case["x"], p["K"], distance=p["metric"], p=p["norm_p"], **graph)
    case.equal(got.medoids, "medoids")
    case.equal(got.assign, "assign")


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
    case.close(got.hidden.flatten(0, 1).transpose(0, 1), "out")


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
        case.close(seen[0].transpose(0, 1), "cluster_input", atol=1e-6)
        assert_equal(seen[0], seen[1], "default layer")
        ((at, reduced),) = got.reductions
        assert at == number
        assert reduced.medoids is not None
        assert reduced.assign is not None
        case.equal(reduced.medoids.flatten(0, 1), "medoids")
        if (assign := case.output("assign")) is not None:
            assert_equal(reduced.assign.reshape(assign.shape), assign, "assign")
        out = reduced.hidden.flatten(0, 1).transpose(0, 1)
        case.close(out, "cluster_output", atol=1e-6)
        last = got.last_hidden_state.flatten(0, 1)
        case.close(last, "last_hidden_state", atol=1e-6)


CHECKS = {
    "centerclip.kmedoids": check_kmedoids,
    "centerclip.spectral": check_spectral,
    "centerclip.segment_reduce": check_segment_reduce,
    "centerclip.e2e_clip": check_e2e_clip,
}
