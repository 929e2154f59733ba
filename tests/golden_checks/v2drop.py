"""Golden checks of v2drop: a decoder of stub layers that drops in stages."""

from typing import Any

import torch
from torch import Tensor

from golden_checks.case import Case
from golden_checks.sequences import prompt
from tokprune.engine.contracts import ScoringLayer, SequenceView
from tokprune.methods.v2drop import V2Drop


def check_run(case: Case) -> None:
    """The stage of the method between stub layers, called as the engine calls it."""
    p = case.parameters
    hidden: Tensor = case["hidden"][None].float()
    layers, ratios = zip(*p["stages"])
    method = V2Drop(ratios=ratios, prune_before=layers)
    (stage,) = method.plan(_Facts(p["layers"])).decoder  # type: ignore[arg-type]
    run, scoring = stage.start(), _NoAttention()
    sequence = prompt(hidden.shape[1], p["start"], p["image_tokens"])
    for layer, weight in enumerate(case["weights"]):
        if layer in stage.prune_before:
            keep = run.before_layer(layer, hidden, sequence, scoring)  # type: ignore[arg-type]
            if keep is not None:
                assert keep.counts is not None
                index = (keep.mask | ~sequence.visual).nonzero()[:, 1][None]
                sequence = SequenceView(
                    **{
                        name: getattr(sequence, name).gather(1, index)
                        for name in ("column", "position", "slot", "segment", "after")
                    },
                    counts=keep.counts, entering=sequence.entering,
                    text_after=sequence.text_after, lengths=[index.shape[1]],
                )  # fmt: skip
                run.dropped(layer, index)
                hidden = hidden[:, index[0]]
        if layer in layers:
            kept = sequence.column[sequence.visual]
            case.equal(kept, f"kept_{layer}")
        hidden = hidden + torch.tanh(hidden @ weight)
    case.equal(sequence.position[0], "position_ids")
    case.close(hidden[0], "out", 1e-4)


class _Facts:
    def __init__(self, layers: int) -> None:
        self.decoder_layers, self.max_visual_tokens = layers, 1 << 20


class _NoAttention(ScoringLayer):
    """Says where the method looks at attention."""

    def attention(self, hidden: Tensor, sequence: SequenceView) -> Any:
        raise AssertionError("no attention is read")

    final_norm = attention  # type: ignore[assignment]


CHECKS = {"run": check_run}
