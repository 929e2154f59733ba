"""One table of methods that drives every suite: adding a method adds it everywhere.

Options suit the tiny models of :mod:`tiny` (36 patches per tile, 8 decoder layers).
"""

from __future__ import annotations

from typing import Any

#: methods that only drop tokens, so that the masked oracle applies
PRUNING: dict[str, tuple[str, dict[str, Any]]] = {
    "random": ("random", {"keep": 10}),
    "fastv": ("fastv", {"keep": 7, "prune_before": 2}),
    "grid": ("grid", {"keep": 11}),
    "fastv-text": ("fastv", {"keep": 0.2, "prune_before": 3, "rows": "text"}),
    "todre": ("todre", {"keep": 10, "tau": 0.5, "prune_before": (5, 7)}),
    "todre-k-center": (
        "todre",
        {
            "keep": 0.25,
            "select": "k_center",
            "tau": 0.5,
            "prune_before": 5,
            "positions": "preserve",
        },
    ),
    "todre-stage2": ("todre", {"keep": None, "tau": 0.89, "prune_before": 5}),
    "dart": ("dart", {"keep": 14, "prune_before": 2}),
    "dart-norm": (
        "dart",
        {
            "keep": 0.3,
            "prune_before": 3,
            "image_pivots": 2,
            "text_pivots": 3,
            "pivot_order": "norm",
        },
    ),
    "dart-few": ("dart", {"keep": 3, "pivot_order": "norm", "positions": "compact"}),
    "dart-centred": ("dart", {"keep": 9, "pivot_order": "norm", "centre": "plain"}),
    "cdpruner": ("cdpruner", {"keep": 10}),
    "cdpruner-text": ("cdpruner", {"keep": 10, "relevance": "text"}),
    "cdpruner-image": ("cdpruner", {"keep": 0.15, "scope": "image"}),
    "cdpruner-theta": (
        "cdpruner",
        {"keep": 8, "relevance": "text", "theta": 0.6, "positions": "preserve"},
    ),
    "divprune": ("divprune", {"keep": 9}),
    "divprune-centred": ("divprune", {"keep": 12, "centre": "plain"}),
    "cdpruner-centred": ("cdpruner", {"keep": 9, "relevance": "text", "centre": "standardised"}),
    "divprune-published": ("divprune", {"keep": 0.25, "order": "published"}),
    "transprune": ("transprune", {"prune_before": (3, 4, 6), "transition_layers": (2, 3, 4, 5)}),
    "transprune-ttv": (
        "transprune",
        {
            "keep": 5,
            "prune_before": (2, 5, 7),
            "transition_layers": (0, 2, 4, 5),
            "alpha": 1,
            "direction": "abs",
        },
    ),
    "transprune-preserve": (
        "transprune",
        {
            "keep": (0.7, 12, 3),
            "prune_before": (1, 4, 5),
            "transition_layers": (1, 3),
            "positions": "preserve",
        },
    ),
    "fastervlm": ("fastervlm", {"keep": 9}),
    "fastervlm-image": (
        "fastervlm",
        {"keep": 23, "scope": "image", "order": "spatial", "positions": "preserve"},
    ),
    "vispruner": ("vispruner", {"keep": 9}),
    "vispruner-image": (
        "vispruner",
        {"keep": 31, "important_ratio": 0.25, "scope": "image", "positions": "preserve"},
    ),
    "scope": ("scope", {"keep": 9}),
    "scope-image": (
        "scope",
        {"keep": 27, "alpha": 0.5, "combine": "add", "scope": "image", "positions": "preserve"},
    ),
    "score": ("score", {"keep": 9}),
    "score-image": (
        "score",
        {"keep": 29, "alpha": 0.3, "scope": "image", "positions": "preserve"},
    ),
    "hiprune": ("hiprune", {"keep": 9, "alpha": 0.6}),
    "hiprune-strict": (
        "hiprune",
        {
            "keep": 33,
            "alpha": 0.9,
            "object_layer": 0,
            "strict_neighbours": True,
            "scope": "image",
            "positions": "preserve",
        },
    ),
    "hired": ("hired", {"keep": 10}),
    "hired-published": (
        "hired",
        {
            "keep": 0.3,
            "alpha": 0.4,
            "budget_regions": "bands",
            "rounding": "floor",
            "positions": "preserve",
        },
    ),
    "holov": ("holov", {"keep": 10}),
    "holov-published": (
        "holov",
        {"keep": 0.3, "crops": 5, "order": "published", "positions": "preserve"},
    ),
    "flowcut": ("flowcut", {"keep": 12}),
    "flowcut-paper": (
        "flowcut",
        {
            "keep": 0.35,
            "semantic": "cosine",
            "value_norm": "per_head",
            "period": 1,
            "order": "spatial",
            "positions": "preserve",
        },
    ),
    "flowcut-two-stage": (
        "flowcut",
        {"keep": 6, "tower_keep": 11, "decoder_cut": True, "prune_before": 4, "entropy": 0.8},
    ),
    "pyramiddrop": ("pyramiddrop", {"prune_before": (2, 4, 6)}),
    "pyramiddrop-counts": (
        "pyramiddrop",
        {"keep": (20, 0.3, 4), "prune_before": (1, 2, 7), "positions": "preserve"},
    ),
    "pyramiddrop-last": ("pyramiddrop", {"keep": 5, "prune_before": (1, 3, 4, 6)}),
    "sparsevlm-prune": ("sparsevlm", {"keep": 6, "prune_before": (2, 4, 6), "recycle": 0}),
    "sparsevlm-plus": (
        "sparsevlm",
        {"keep": (20, 0.3, 5), "prune_before": (1, 3, 6), "version": "plus", "heads": 2},
    ),
    "sparsevlm-rank": (
        "sparsevlm",
        {"keep": None, "prune_before": (2, 4), "recycle": 0, "rank_scale": 1.5},
    ),
    "sieve": ("sieve", {"keep": 7}),
    "sieve-schedule": (
        "sieve",
        {
            "keep": (0.5, 6),
            "prune_before": (2, 5),
            "heads": 2,
            "energy": 0.9,
            "window": 3,
            "positions": "compact",
        },
    ),
    "v2drop": ("v2drop", {"prune_before": (2, 3, 6), "ratios": (0.6, 0.5, 0.0)}),
    "v2drop-none-left": (
        "v2drop",
        {
            "prune_before": (1, 5),
            "ratios": (0.4, 0.0),
            "drop_all": True,
            "positions": "compact",
        },
    ),
    "mustdrop-filter": (
        "mustdrop",
        {"spatial": False, "gamma": 0.03, "alpha": 0.03, "prune_before": (2, 4, 5)},
    ),
    "mustdrop-filter-continue": (
        "mustdrop",
        {
            "spatial": False,
            "gamma": 0.03,
            "alpha": 0.03,
            "prune_before": (2, 4, 5),
            "decode_positions": "continue",
            "positions": "preserve",
        },
    ),
    "mustdrop-filter-keep": (
        "mustdrop",
        {"spatial": False, "keep": 5, "prune_before": (3, 4, 6, 7), "cache_policy": False},
    ),
    "mustdrop-filter-schedule": (
        "mustdrop",
        {"spatial": False, "keep": (20, 0.2), "prune_before": (1, 5), "key_rate": 0.15},
    ),
}

PRUNING |= {
    "mmtok": ("mmtok", {"keep": 10}),
    "mmtok-image": (
        "mmtok",
        {"keep": 0.2, "scope": "image", "similarity": "projected", "positions": "preserve"},
    ),
    "msdg": ("msdg", {"keep": 10, "groups": 4}),
    "msdg-sinks": (
        "msdg",
        {
            "keep": 0.3,
            "layers": (1, 4, 2, 3),
            "sink": (2, 3, 1.0),
            "seed": 5,
            "positions": "preserve",
        },
    ),
}

PRUNING |= {
    "priortr": ("priortr", {"keep": 7, "prune_before": 3}),
    "priortr-caches": (
        "priortr",
        {
            "keep": 0.2,
            "prune_before": (2, 4),
            "queries": "but_last",
            "heads": "max",
            "cut_earlier_caches": True,
            "positions": "compact",
        },
    ),
    "priortr-threshold": (
        "priortr",
        {"keep": 0.6, "queries": "last", "score_threshold": 0.0, "cut_earlier_caches": True},
    ),
    "clse": ("clse", {"keep": (20, 0.3, 5), "prune_before": (1, 3, 6)}),
    "clse-caches": (
        "clse",
        {
            "keep": 4,
            "prune_before": (1, 2, 5),
            "first_cut": "clse",
            "cutoff": 0.4,
            "cut_earlier_caches": True,
        },
    ),
    "clse-attention": (
        "clse",
        {"keep": 0.15, "prune_before": (2, 5), "first_cut": "attn", "positions": "compact"},
    ),
}

PRUNING |= {
    "tops": ("tops", {"keep": 8, "prune_before": (3, 6)}),
    "tops-schedule": (
        "tops",
        {
            # few of those before: with most, coverage is a matter of rounding
            "keep": (0.2, 0.15, 0.1),
            "input_keep": 0.5,
            "prune_before": (1, 4, 7),
            "normalise": "minmax",
            "raters": "sparsevlm",
            "positions": "preserve",
        },
    ),
    "tops-compact": (
        "tops",
        {
            "keep": 9,
            "prune_before": 5,
            "decoder_lam": 1.0,
            "raters": "last",
            "positions": "compact",
        },
    ),
}

#: clustering methods that keep medoids
PRUNING |= {
    "centerclip": ("centerclip", {"keep": 11}),
    "centerclip-encoder": ("centerclip", {"keep": 9, "place": "encoder", "positions": "preserve"}),
    "centerclip-spectral": (
        "centerclip",
        {"keep": 8, "algorithm": "spectral", "order": "spatial"},
    ),
    "centerclip-projector": (
        "centerclip",
        {"keep": 0.3, "place": "projector", "distance": "cosine"},
    ),
}

#: methods that merge tokens: compared with slow references instead
MERGING: dict[str, tuple[str, dict[str, Any]]] = {
    "pitome": ("pitome", {"keep": 13}),
    "pitome-head": ("pitome", {"keep": 9, "variant": "head"}),
    "pitome-paper": ("pitome", {"keep": 11, "variant": "paper"}),
    "tome": ("tome", {"r": 4}),
    "apet": ("apet", {"keep": 12, "basis": 3, "decoder_keep": 0.5, "prune_before": 4}),
    "apet-official": (
        "apet",
        {
            "keep": 0.3,
            "basis": 4,
            "parity": "official",
            "start": "random",
            "order": "published",
            "positions": "preserve",
        },
    ),
    "ficoco": ("ficoco", {"keep": 14}),
    "ficoco-decoder": ("ficoco", {"keep": 6, "place": "decoder", "first": 2, "quantile": 0.9}),
    "ficoco-r": (
        "ficoco",
        {"r": 7, "first": 1, "quantile": 0.9, "positions": "preserve"},
    ),
    "visionzip": ("visionzip", {"dominant": 8, "contextual": 3}),
    "visionzip-spatial": ("visionzip", {"keep": 11, "order": "spatial"}),
    "prunesid": ("prunesid", {"keep": 11}),
    "prunesid-patches": (
        "prunesid",
        {"keep": 12, "keep_cls": False, "importance": "loading", "positions": "preserve"},
    ),
    "prunesid-random": (
        "prunesid",
        {"keep": 9, "keep_cls": False, "pca": "random", "order": "spatial"},
    ),
    "vscan": ("vscan", {"keep": 5, "prune_before": 4}),
    "vscan-shares": (
        "vscan",
        {
            "input_keep": 0.6,
            "keep": (0.3, 0.15),
            "prune_before": (3, 6),
            "window": 2,
            "shallow_layer": 1,
            "local_shares": "limit",
            "positions": "preserve",
        },
    ),
    "prumerge": ("prumerge", {"keep": 11}),
    "prumerge-plus": ("prumerge", {"keep": 0.4, "plus": True, "order": "spatial"}),
    "prumerge-adaptive": ("prumerge", {"neighbours": 4, "positions": "preserve"}),
    "pool": ("pool", {"keep": 9}),
    "pool-window": ("pool", {"window": 3, "positions": "preserve"}),
    "m3": ("m3", {"keep": 9}),
    "m3-level": ("m3", {"level": 2, "positions": "preserve"}),
    "sparsevlm": ("sparsevlm", {"keep": (18, 0.25, 4), "prune_before": (2, 4, 6)}),
    "sparsevlm-spatial": (
        "sparsevlm",
        {
            "keep": 5,
            "prune_before": (1, 3, 7),
            "recycle": 0.8,
            "cluster_size": 3,
            "order": "spatial",
            "positions": "preserve",
        },
    ),
    "sparsevlm-plus-recycled": (
        "sparsevlm",
        {"keep": 9, "prune_before": (3, 5), "version": "plus", "recycle": 0.5},
    ),
    "sparsevlm-rank-recycled": (
        "sparsevlm",
        {"keep": None, "prune_before": (2, 5), "rank_scale": 2.0, "rank_bias": 1.0},
    ),
    "mustdrop": (
        "mustdrop",
        {
            "threshold": 0.14,
            "window": (2, 2),
            "gamma": 0.03,
            "alpha": 0.03,
            "prune_before": (2, 4, 5, 7),
        },
    ),
    "mustdrop-continue": (
        "mustdrop",
        {
            "threshold": 0.2,
            "gamma": 0.05,
            "alpha": 0.05,
            "prune_before": (2, 5),
            "decode_positions": "continue",
            "order": "spatial",
            "merge_after_layer": 2,
        },
    ),
    "mustdrop-fixed": (
        "mustdrop",
        {"retained": 21, "keep": 6, "prune_before": (2, 4, 6), "positions": "preserve"},
    ),
    "mustdrop-lightcompress": ("mustdrop", {"variant": "lightcompress", "retained": 13}),
}

MERGING |= {
    "centerclip-mean": ("centerclip", {"keep": 10, "aggregate": "mean", "p": 1.0}),
    "centerclip-encoder-mean": (
        "centerclip",
        {"keep": 12, "aggregate": "mean", "place": "encoder", "layer": 2},
    ),
    "centerclip-projector-mean": (
        "centerclip",
        {"keep": 7, "aggregate": "mean", "place": "projector", "positions": "preserve"},
    ),
}

#: with a token of its own
MERGING |= {
    "occamtoken": (
        "occamtoken",
        {"lambda1": 0.9, "neurons": ((1, 3), (1, 17), (2, 8)), "prune_before": 4},
    ),
    "occamtoken-whole": (
        "occamtoken",
        {
            "lambda2": 2.0,
            "lambda1": 0.0,
            "prune_before": 6,
            "min_keep": 3,
            "positions": "preserve",
        },
    ),
    "occamtoken-keep": ("occamtoken", {"lambda1": 0.5, "keep": 9, "prune_before": 3}),
}

MERGING |= {
    "trim": ("trim", {"keep": 10}),
    "trim-auto": ("trim", {"sign": -1}),
}

ALL = {**PRUNING, **MERGING}

#: methods that work by stages of the same kinds as another one here: suites about the engine rather
#: than about methods take them with --full only (see ``conftest.py``)
ALIKE = {
    "apet", "hired", "hiprune", "holov", "msdg", "priortr", "prunesid", "scope", "score",
    "sieve", "tops", "vispruner",
}  # fmt: skip
#: their cases, and variants of the kind
ALIKE_CASES = {case for case in ALL if ALL[case][0] in ALIKE or case.endswith("-centred")}

#: one case per method (named like it), for suites about the engine rather than about options
CORE = {case: ALL[case] for case in ALL if case in (ALL[case][0], "mustdrop-filter")}
CORE_PRUNING = {case: ALL[case] for case in CORE if case in PRUNING}
