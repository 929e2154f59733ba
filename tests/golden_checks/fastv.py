"""Golden checks of fastv: last-row ranking."""

import torch

from golden_checks.case import Case, assert_close, assert_equal
from tokprune.operators.fastv import last_row_scores, row_scores, select
from tokprune.operators.topk import rank


def _last_row(case: Case) -> torch.Tensor:
    """[H, L], from a full map [1, H, L, L], one row of it [1, H, 1, L], or [(1,) H, L]."""
    attn = next(v for name, v in case.t.items() if name.startswith("attn"))
    row = attn[..., -1, :] if attn.dim() == 4 else attn
    return row.reshape(-1, attn.shape[-1])


def check_select(case: Case) -> None:
    p = case.parameters
    start, n, k = p["image_start"], p["image_len"], p["keep"]
    row = _last_row(case)
    half = p["dtype"] == "float16"
    score = last_row_scores(row)[start : start + n]
    assert_close(score, case["scores"], "scores", 1e-3 if half else 1e-5)
    assert_close(row_scores(row[:, None])[start : start + n], score, "scores of one row")
    keep = select(row, start, n, k)
    assert_equal(select(row[None], start, n, k)[0], keep, "keep of a batch of one")
    top = rank(score)[:k] + start
    image = keep[(keep >= start) & (keep < start + n)]
    assert_equal(image, top.sort().values, "keep against the ranking")
    if not half:
        assert_equal(keep, case["keep"], "keep")
        assert_equal(top, case["topk_by_score"], "topk_by_score")
        return
    # The official mean is rounded to half: tokens it ties may swap places.
    assert_equal(torch.tensor(len(keep)), torch.tensor(len(case["keep"])), "number kept")
    want = case["topk_by_score"]
    assert_close(score[top - start], score[want - start], "scores in rank order", 1e-3)
    assert set(keep.tolist()) - set(image.tolist()) == set(case["keep"].tolist()) - set(
        want.tolist()
    ), "text tokens"
    for index in set(image.tolist()) ^ set(want.tolist()):
        cut = score[top - start].min()
        assert abs(score[index - start] - cut) <= 1e-3 * cut, f"token {index} is not at the cut"


CHECKS = {"fastv.select": check_select}
