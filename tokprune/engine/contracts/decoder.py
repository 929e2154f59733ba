"""What stages inside the decoder get and give."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from tokprune.engine.contracts.attention import Attention
from tokprune.engine.contracts.prompt import ImageTokens
from tokprune.engine.contracts.vision import Positions
from tokprune.operators.topk import segment_topk


@dataclass(eq=False)
class SequenceView:
    """The sequence as it is now, entering some decoder layer (prefill).

    Tensors are [B, L]: ``column``: prompt column, −1 = padding; ``slot``: the column that it takes
    in masks, −1 = padding: the same, but that slots always ascend (the k survivors of an image
    that stand in another order, or merged ones without a place, take k columns of it);
    ``position``: rotary position, [3, B, L] under M-RoPE; ``segment``: number of the image inside
    its batch row (0…S−1), −1 for text, newline tokens included with their image; ``after``: real
    text after the last visual token of the row;
    ``tag``: marks from the encoder run or None. Host side: ``counts[b][s]`` visual tokens alive,
    ``entering[b][s]`` the same when they entered the decoder, ``text_after[b]`` real text tokens
    after the last visual token, ``lengths[b]`` real tokens.
    """

    column: Tensor
    position: Tensor
    segment: Tensor
    after: Tensor
    counts: list[list[int]]
    entering: list[list[int]]
    text_after: list[int]
    lengths: list[int]
    slot: Tensor
    #: [B] what the tokens after this sequence stand before their original positions; None: nothing
    shift: Tensor | None = None
    tag: Tensor | None = None
    padded: bool = False
    #: [B, L] where sliding windows count the tokens, once positions were closed up, and [B] what
    #: later tokens stand there before their columns; None: at their slots
    place: Tensor | None = None
    place_shift: Tensor | None = None
    #: whether a row has gaps in its positions (host)
    gaps: bool = False
    #: [B, L] float32, tokens of the prompt that each visual token stands for (1 for text), where
    #: attention is rectified and something was dropped or merged; else None
    size: Tensor | None = None
    #: columns of the prompt that it comes from, and whether it has more of its own (host)
    width: int = 0
    wider: bool = False

    @property
    def valid(self) -> Tensor:
        return self.column >= 0

    @property
    def visual(self) -> Tensor:
        return self.segment >= 0

    @property
    def ends_in_image(self) -> list[bool]:
        """Rows whose last real token is a visual one, from which the answer is read (host)."""
        return [not text and any(own) for text, own in zip(self.text_after, self.entering)]

    @property
    def segments(self) -> int:
        """Largest number of images of one batch row."""
        return max([0, *(len(c) for c in self.counts)])

    def counts_after(self, keep: Callable[[int], int]) -> list[list[int]]:
        """Visual tokens of every image after a step that leaves ``keep(n)`` of the n tokens that
        entered the decoder, but never more than are alive; host."""
        return [
            [min(keep(entered), now) for entered, now in zip(*row)]
            for row in zip(self.entering, self.counts)
        ]

    def text_rows(self) -> tuple[Tensor, Tensor]:
        """Indices of the text after the last image, right-aligned: (index [B, R], real [B, R]).

        R is the largest count of the batch, known on the host; where a row has less, the
        leading entries are not real. R = 0 if no row has text after its image.
        """
        r = max([0, *self.text_after])
        arange = torch.arange(self.after.shape[1], device=self.after.device)
        key = torch.where(self.after, arange, torch.full_like(arange, -1))
        top = key.sort(dim=1, stable=True).values[:, key.shape[1] - r :]
        return top.clamp(min=0), top >= 0

    def last_row(self) -> Tensor:
        """Index of the last real token of every row: [B, 1]."""
        arange = torch.arange(self.column.shape[1], device=self.column.device)
        return torch.where(self.valid, arange, torch.zeros_like(arange)).amax(1, keepdim=True)


@dataclass
class KeepDecision:
    """Answer of a decoder run: ``mask`` [B, L] bool, True where a *visual* token stays (text is
    always kept). ``counts[b][s]``: how many stay per image (host); None where the numbers are
    adaptive, then the engine reads them back (one host synchronisation).

    Merges: ``hidden`` [B, L, D] replaces the sequence before the drop (a merged token takes the
    place of one of the tokens it stands for); ``group`` [B, L]: the place that holds each token
    from now on, −1 if dropped (None: each its own). ``order`` [B, L] long: sort key ≥ 0 of the
    new sequence (None: as before). ``last_stays``: where a row ends in an image, ``mask`` and
    ``counts`` hold its last token, which always stays (False: the engine sees to it, and reads the
    counts of such batches back)."""

    mask: Tensor
    counts: list[list[int]] | None = None
    positions: Positions = "preserve"
    hidden: Tensor | None = None
    group: Tensor | None = None
    order: Tensor | None = None
    last_stays: bool = False

    @classmethod
    def best(
        cls,
        score: Tensor,
        counts: list[list[int]],
        sequence: SequenceView,
        positions: Positions = "preserve",
        together: bool = False,
    ) -> KeepDecision:
        """The visual tokens of the highest score; of equal scores the earlier token.

        Args:
            score: [B, L] of any float dtype; entries of text do not count.
            counts: tokens to keep of every image of every row (host).
            sequence: that the scores belong to.
            positions: of the shortened sequence.
            together: all images of a row share one ranking and the sum of their counts. What each
                is left with is then known to the device alone, unless nothing or everything goes.
        """
        segment, wanted = sequence.segment, counts
        if any(sequence.ends_in_image):
            # the answer is read from the row's last token, which therefore stays
            ends = torch.tensor(sequence.ends_in_image)[:, None].to(score.device)
            arange = torch.arange(score.shape[1], device=score.device)
            last = ends & (arange == sequence.last_row().to(score.device))
            if not score.is_floating_point():
                score = score.float()
            score = score.masked_fill(last, torch.inf)
            counts = wanted = [
                [max(n, int(end and s + 1 == len(row) and now[s] > 0)) for s, n in enumerate(row)]
                for row, now, end in zip(counts, sequence.counts, sequence.ends_in_image)
            ]
        if together:
            segment, wanted = torch.where(sequence.visual, 0, -1), [[sum(row)] for row in counts]
        width = max([0, *map(len, wanted)])
        budget = torch.tensor([row + [0] * (width - len(row)) for row in wanted])
        device = segment.device
        mask = segment_topk(score.to(device), segment, budget.to(device, non_blocking=True))
        shared = together and any(
            len(row) > 1 and row != now for row, now in zip(counts, sequence.counts)
        )
        return cls(mask, None if shared else counts, positions, last_stays=True)


@dataclass
class CachePolicy:
    """Answer of a decoder run at the end of prefill. ``index[l]`` [B, n']: of the sequence that
    layer ``l`` cached in this prefill, the places that stay (−1 = padding at the left); layers
    that are not named, and entries of earlier turns, stay as they are.
    ``continue_positions``: decode steps go on with the prefill numbering of each layer; else their
    position is the number of entries in the layer's cache."""

    index: dict[int, Tensor] = field(default_factory=dict)
    #: real entries per batch row of the layers in ``index`` (host)
    lengths: dict[int, list[int]] = field(default_factory=dict)
    continue_positions: bool = True


class ScoringLayer(ABC):
    """The decoder layer about to run, for methods that rank with its attention (queries and keys
    are computed for this purpose: the layer itself runs on the survivors only)."""

    @abstractmethod
    def attention(self, hidden: Tensor, sequence: SequenceView) -> Attention:
        """Attention of the layer on ``hidden`` [B, L, D], as it would run on all of it. Layers
        that may be asked are those of :attr:`DecoderStage.ahead`."""

    def probabilities(self, hidden: Tensor, rows: Tensor, sequence: SequenceView) -> Tensor:
        """Softmax rows of the queries at ``rows`` [B, R] over all visible keys of ``hidden``
        [B, L, D]: float32 [B, H, R, L]."""
        return self.attention(hidden, sequence).rows(rows)

    @abstractmethod
    def final_norm(self, hidden: Tensor) -> Tensor:
        """The decoder's final norm, which it applies to its last layer, on ``hidden`` [B, L, D]."""


class DecoderRun:
    """One prefill through the decoder. All hooks default to doing nothing."""

    def images(self, images: Sequence[ImageTokens]) -> None:
        """Before the first layer: what stands in the prompts, in reading order, and on which cells,
        as it enters the decoder, without features. Not called where a prompt came as embeddings of
        which only the places of visual tokens are known."""

    def attention(self, layer: int, attention: Attention, sequence: SequenceView) -> None:
        """Called right after the attention of a tapped layer."""

    def transition(
        self, layer: int, module: Literal["attention", "mlp"], before: Tensor, after: Tensor,
        sequence: SequenceView,
    ) -> None:  # fmt: skip
        """Input (after its norm) and output (before the residual) of a module, [B, L, D]."""

    def before_layer(
        self, layer: int, hidden: Tensor, sequence: SequenceView, scoring: ScoringLayer
    ) -> KeepDecision | None:
        """Before decoder layer ``layer`` (0-based) runs; ``hidden`` [B, L, D]."""
        return None

    def dropped(self, layer: int, index: Tensor) -> None:
        """After a drop: ``index`` [B, L'] old place of every surviving entry (padding clamped),
        so that per-token state can follow."""

    def after_prefill(self, sequences: Sequence[SequenceView]) -> CachePolicy | None:
        """End of prefill; ``sequences[l]`` is the sequence that layer ``l`` cached."""
        return None


class DecoderStage(ABC):
    """Static description of work inside the decoder (0-based layer numbers)."""

    taps: frozenset[int] = frozenset()
    transition_layers: frozenset[int] = frozenset()
    prune_before: frozenset[int] = frozenset()
    has_cache_policy: bool = False
    #: of the sequences that the run shortens, where the stage knows
    positions: Positions | None = None

    @property
    def ahead(self) -> frozenset[int]:
        """Layers of ``prune_before`` whose own attention the run may ask for, before they run."""
        return self.prune_before

    @abstractmethod
    def start(self) -> DecoderRun: ...
