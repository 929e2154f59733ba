"""Golden checks of trim: similarity, outliers of a batch, kept tokens, mean of the others."""

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from golden_checks.case import Case
from tokprune.engine.contracts import TowerInput
from tokprune.methods.clip_relevance import ClipRelevance
from tokprune.methods.trim import TRIM
from tokprune.methods.trim.tiles import Alike, squeeze


class _Given(ClipRelevance):
    """The projections of a case, without a whole CLIP around them."""

    def __init__(self, case: Case) -> None:
        object.__setattr__(self, "embeds", tuple(text[None] for text in case["text"]))
        object.__setattr__(self, "case", case)

    def project(self, patches: Tensor) -> Tensor:
        case = self.case  # type: ignore[attr-defined]
        weight, bias = case["ln_weight"], case["ln_bias"]
        normed = layer_norm(patches, weight.shape, weight, bias, case.parameters["ln_eps"])
        return normed @ case["projection"].T


def check_select(case: Case) -> None:
    x, ratio = case["features"], case.parameters["ratio"]
    number, n = x.shape[:2]
    relevance = _Given(case)
    similarity = relevance.product(x, TowerInput(None, tuple(range(number)), x.device))  # type: ignore[arg-type]
    case.close((-similarity).softmax(-1), "scores")
    keep = None if ratio == -1 else int(n * ratio) + 1  # with the mean
    method = TRIM(keep=keep, relevance=relevance, outliers="call")
    rows = torch.arange(n).expand(number, n)
    done = squeeze(method, [Alike([*range(number)], [1] * number, rows, x, similarity)])
    case.equal(torch.stack([done[i].kept for i in range(number)]), "kept")
    want = case.output("out")
    assert want is not None
    half = want.dtype == torch.float16
    out = torch.stack([torch.cat([x[i, own.kept], own.mean[None]]) for i, own in done.items()])  # type: ignore[index]
    case.close(out, "out", rtol=2e-3 if half else 1e-5)


CHECKS = {"trim.select": check_select}
