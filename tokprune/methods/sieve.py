"""SIEVE: visual tokens that the text attends to and that its hidden states do not explain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from torch import Tensor

from tokprune.engine.contracts import Attention, ModelFacts, Plan, SequenceView
from tokprune.methods.decoder_rows import asking_rows
from tokprune.methods.depth import first_layers
from tokprune.methods.options import AtLeast, Range
from tokprune.methods.registry import register_method
from tokprune.methods.scoring import DecoderScorer
from tokprune.methods.sieve_stage import ResidualStage
from tokprune.operators.sieve import strongest_heads


@register_method
@dataclass(frozen=True)
class SIEVE(DecoderScorer):
    """Before a decoder layer, every visual token is projected on the span of the hidden states of
    the text behind the images. The share of it that is left over, times what the text attends to it
    in the heads which give its image most, squared, is its score. Tokens are taken one after the
    other, and each lowers the scores of those whose residuals point its way (by 1 − cos²). The
    attention is that of the layer just run. Prefill only; every image has its own budget.

    Where no text follows the images, the prompt's last token stands in, which spans nothing: its
    attention and the discount alone decide (ours).

    Args:
        keep: visual tokens per image after each step, a count or fraction for each layer of
            ``prune_before``; fractions are of the tokens that entered the decoder. One number is
            the last step's: every step then keeps the same share of what it finds.
        prune_before: decoder layer or layers, 0-based, before which tokens are dropped. The paper
            prunes at "a few" layers that it does not name, so its figures cannot be repeated: one
            cut before layer 2 is ours, and leaves more tokens on the mean over layers than ``keep``
            says.
        heads: how many heads count, of each image those of the largest mass on it (published: 12
            of 32; all where there are fewer).
        energy: the ridge of the projection is the squared singular value of the text at which the
            largest ones hold this share of all.
        eps: added to the ridge (the paper has no value).
        window: this many text tokens at most, the last ones (None: all). With long texts the span
            grows, and little is left over of any token.
        positions: "preserve" keeps the original ids (ours), "compact" renumbers after every drop.

    Source: "When Vision Becomes Text: Visual Token Pruning via Cross-Modal Residual Guidance",
    2026, arXiv 2608.10489. There is no official code.
    """

    name = "sieve"
    needs = "text rows of one layer, and its output"
    paper = "arXiv 2608.10489"
    source = "paper's equations"
    reads_prompt = True

    heads: Annotated[int, AtLeast(1)] = 12
    energy: Annotated[float, Range(0, 1, low_open=True)] = 0.75
    eps: Annotated[float, Range(0, 1e6, low_open=True)] = 1e-6
    window: Annotated[int, AtLeast(1)] | None = None

    @classmethod
    def options_for_depth(cls, decoder_layers: int) -> dict[str, Any]:
        return first_layers(decoder_layers)

    def plan(self, facts: ModelFacts) -> Plan:
        super().plan(facts)  # its checks
        return Plan(decoder=(ResidualStage(self),))

    def text(self, sequence: SequenceView) -> tuple[Tensor, Tensor]:
        """Places [B, R] of the text that counts, and which of them are real."""
        rows, real = asking_rows(sequence)
        if self.window is None:
            return rows, real
        # real text is at the right, with the stand-in behind it where some rows need one
        spare = int(not min(sequence.text_after))
        last = slice(max(0, rows.shape[1] - self.window - spare), None)
        return rows[:, last], real[:, last]

    def score(self, attention: Attention, sequence: SequenceView) -> Tensor:
        """What the text gives each token [B, L], summed over the heads of its image."""
        received = None
        for index, real in attention.parts(*self.text(sequence)):
            rows = attention.rows(index).masked_fill_(~real[:, None, :, None], 0.0).sum(2)
            received = rows if received is None else received + rows
        assert received is not None
        heads = min(self.heads, received.shape[1])
        return strongest_heads(received, heads, sequence.segment, sequence.segments)[1]
