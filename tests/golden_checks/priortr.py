"""Golden checks of priortr: the method's own score of a prompt whose attention rows are given."""

from __future__ import annotations

from torch import Tensor

from golden_checks.case import Case
from golden_checks.sequences import prompt
from tokprune.engine.contracts import Attention, KeepDecision, ScoringLayer, SequenceView
from tokprune.methods.priortr import PriorTR
from tokprune.methods.priortr_stage import PriorTRRun


class GivenRows(Attention):
    """Rows [H, R, L] of the last R tokens of a prompt of L."""

    def __init__(self, given: Tensor) -> None:
        self.given = given[None].float()
        self.key = self.query = given.new_zeros(1, 1, given.shape[2], given.shape[2])

    def rows(self, index: Tensor) -> Tensor:
        heads, rows, length = self.given.shape[1:]
        place = index[:, None, :, None] - (length - rows)
        return self.given.gather(2, place.expand(-1, heads, -1, length))


def check_select(case: Case) -> None:
    p, attention = case.parameters, case["attention"]
    first, count = p["first_visual"], p["n_visual"]
    sequence = prompt(attention.shape[2], first, count)
    method = PriorTR(
        min(p["keep_tokens"] or count, count), queries=p["queries"], heads=p["heads"],
        score_threshold=p["score_threshold"],
    )  # fmt: skip
    run = PriorTRRun(method, frozenset())
    score = method.score(GivenRows(attention), sequence)
    case.close(score[0, first : first + count], "scores")
    run.attention(2, GivenRows(attention), sequence)
    nothing = attention.new_zeros(1, sequence.lengths[0], 1)
    keep = run.before_layer(3, nothing, sequence, _NoLayer())
    mask = sequence.visual if keep is None else keep.mask
    assert isinstance(keep, KeepDecision | None)
    case.equal(mask[0].nonzero().view(-1) - first, "keep")


class _NoLayer(ScoringLayer):
    def attention(self, hidden: Tensor, sequence: SequenceView) -> Attention:
        raise AssertionError("the layer ahead is not asked")

    def final_norm(self, hidden: Tensor) -> Tensor:
        raise AssertionError("no norm is asked for")


CHECKS = {"priortr.select": check_select}
