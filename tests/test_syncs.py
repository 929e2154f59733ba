"""No host synchronisation in a forward, except where a method's definition forces it.

How that is found: :mod:`tokprune.testing.checks.host_reads`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from methods_table import ALL
from test_video_families import VIDEO_ALL, unit_of
from tiny import BUILDERS, VIDEO_BUILDERS

from tokprune.methods import make_method
from tokprune.testing import Case, tiny_family
from tokprune.testing.checks.host_reads import can_find_host_reads, host_read

#: methods whose numbers depend on the data: what they read back, and when
ADAPTIVE = {
    "dart": "places of the pivots, whose order the official code takes from a Python set",
    "flowcut": "tokens dropped per layer (entropy of the class attention)",
    "hired": "tokens of all crops (rounding='floor')",
    "mustdrop": "windows merged, tokens over the thresholds",
    "priortr": "tokens above score_threshold",
    "occamtoken": "tokens that get as much attention as the register, in both stages",
    "prumerge": "outliers of every tile, with neither keep nor ratio",
    "sparsevlm": "rank of the raters' attention (keep=None), once per pruning layer",
    "todre": "stage 2 drops per sample or not",
    "trim": "outliers of each tile (keep=None)",
}
#: settings of those methods whose numbers are fixed after all
FIXED_SETTINGS = {
    "dart-centred",
    "dart-few",
    "dart-norm",
    "hired",
    "mustdrop-fixed",
    "priortr",
    "priortr-caches",
    "prumerge",
    "prumerge-plus",
} | {
    case
    for case in ALL
    if ALL[case][0] in ("sparsevlm", "trim") and ALL[case][1].get("keep") is not None
}

pytestmark = pytest.mark.skipif(
    not can_find_host_reads(), reason="transformers 4 itself reads the placeholders"
)


def run_on_meta(
    family: str, method: str, options: dict[str, Any], prompt: tuple[Any, ...] = (4, "image", 6)
) -> None:
    tiny = tiny_family({**BUILDERS, **VIDEO_BUILDERS}[family])
    made, prompts = make_method(method, **options), [[*prompt], [*prompt]]
    assert host_read(Case(made, tiny, tiny.build(), prompts, [(20, 40), (20, 40)])) is None


@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize(
    "case", [c for c in ALL if ALL[c][0] not in ADAPTIVE or c in FIXED_SETTINGS]
)
def test_prefill_and_step_read_nothing_back(case: str, family: str) -> None:
    run_on_meta(family, *ALL[case])


@pytest.mark.parametrize("family", VIDEO_BUILDERS)
@pytest.mark.parametrize(
    "case", [c for c in VIDEO_ALL if VIDEO_ALL[c][0] not in ADAPTIVE or c in FIXED_SETTINGS]
)
def test_videos_read_nothing_back(case: str, family: str) -> None:
    method, options = VIDEO_ALL[case]
    video_unit = unit_of(case, method)
    prompt: tuple[Any, ...] = (4, "video", 3, "image", 6)
    if method == "fastv" and video_unit == "video":
        prompt = (4, "video", 6)  # images that share a budget: how many of each stay is read back
    run_on_meta(family, method, {**options, "video_unit": video_unit}, prompt)


def test_the_meta_device_catches_reads() -> None:
    """The instrument works: reading a value there fails."""
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.zeros(2, device="meta").sum().item()
