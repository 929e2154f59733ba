"""Golden checks of visionzip."""

import torch

from golden_checks.case import Case, assert_close, assert_equal
from tokprune.operators.anyres import visionzip_pack
from tokprune.operators.visionzip import compress, dominant


def check_compress(case: Case) -> None:
    p, hidden, metric = case.parameters, case["hidden"], case["metric"]
    name = next(n for n in ("attn", "cls_row", "cls_attn") if n in case)
    attn = case[name]
    got = compress(hidden, metric, attn, p["dominant"], p["contextual"])
    rtol = 1e-5 if hidden.dtype == torch.float32 else 2e-3
    assert_equal(got.indices, case["all_indices"], "all_indices")
    assert_close(got.out, case["out"], "out", rtol)
    if attn.dim() == 4:
        assert_equal(dominant(attn[:, :, 0], p["dominant"]), got.indices, "from the class row")


def check_anyres_pack(case: Case) -> None:
    p, features = case.parameters, case["features"]
    tiles = (p["grid_height"], p["grid_width"])
    at = visionzip_pack(case["all_indices"], p["contextual"], tiles, base=0)
    assert_equal(features[at[:, 0] - 1, at[:, 1]], case["out"], "out")
    rows = p["dominant"] + p["contextual"]
    with_base = visionzip_pack(case["all_indices"], p["contextual"], tiles)
    assert_equal(with_base[rows:], at, "crops after the base tile")
    lead = torch.stack([torch.zeros(rows, dtype=torch.long), torch.arange(rows)], dim=1)
    assert_equal(with_base[:rows], lead, "base tile")


CHECKS = {
    "visionzip.compress": check_compress,
    "visionzip.anyres_pack": check_anyres_pack,
}
