"""What the bench of a GPU check measures, most wanted first."""

from __future__ import annotations

from dataclasses import dataclass, replace

PREFILL = ("encoder", "selection", "prefill")
#: decoding is the rest of the total; a pass of its own would double the time
ANSWERS = ("encoder", "selection", "prefill", "total")

#: methods in the order in which their figures are wanted; all others follow
WANTED = (
    "divprune", "fastv", "visionzip", "todre", "cdpruner", "pyramiddrop", "sparsevlm", "dart",
    "flowcut", "pitome",
)  # fmt: skip


@dataclass(frozen=True)
class Item:
    """Methods at budgets on one model."""

    name: str
    #: a preset of :mod:`tokprune.bench.models`
    shape: str
    #: its visual tokens
    tokens: int
    methods: tuple[str, ...]
    keeps: tuple[int | float, ...]
    #: seconds set aside for it: a guess at what its rounds take, which no GPU has confirmed yet
    seconds: float
    parts: tuple[str, ...] = PREFILL
    batch_sizes: tuple[int, ...] = (1,)
    new_tokens: tuple[int, ...] = (16,)
    text_tokens: int = 64
    #: measurements; six are needed for a speed-up to be claimed
    rounds: int = 7

    def rehearsed(self, methods: int, keeps: int) -> Item:
        """The same on a tiny model: the first methods at the first budgets, as shares of its own
        tokens, with short answers, once."""
        shares = tuple(k if isinstance(k, float) else k / self.tokens for k in self.keeps)
        lengths = tuple(range(2, 2 + len(self.new_tokens)))
        return replace(
            self, methods=self.methods[:methods], keeps=shares[:keeps], new_tokens=lengths,
            batch_sizes=self.batch_sizes[:1], rounds=1, text_tokens=8,
        )  # fmt: skip


def items(every_method: list[str]) -> list[Item]:
    """In order; what nine minutes may not reach stands last.

    Args:
        every_method: names of all methods for images.
    """
    rest = tuple(name for name in every_method if name not in WANTED)
    # encoders that pack images of any size have no class token and no rows to merge
    packed = ("divprune", "fastv", "cdpruner", "pyramiddrop")
    next_, llava = ("llava-next-7b", 2928), ("llava-1.5-7b", 576)
    qwen, large = ("qwen2.5-vl-7b", 1296), ("qwen2.5-vl-7b-1792px", 4096)
    video = ("qwen3-vl-8b-video", 16384)

    def shares(*counts: int) -> tuple[float, ...]:
        """Tokens of the whole image, also for methods whose budget is every tile's."""
        return tuple(count / next_[1] for count in counts)

    first = [
        Item("next-prefill", *next_, WANTED[:4], shares(160, 320), 55),
        Item("llava-prefill", *llava, WANTED[:8], (64,), 20),
        Item("next-answers", *next_, WANTED[:1], shares(160), 95, ANSWERS, new_tokens=(16, 256)),
        Item("video", *video, WANTED[:1], (0.25,), 60, ANSWERS),
        Item("qwen-prefill", *qwen, packed, (1 / 9,), 30),
        Item("llava-answers", *llava, WANTED[:2], (64,), 50, ANSWERS, batch_sizes=(1, 8)),
        Item("qwen-large-prefill", *large, packed[:2], (1 / 9,), 45),
    ]
    return [
        *first,
        Item("llava-others-prefill", *llava, (*WANTED[8:], *rest), (64,), 25),
        Item("next-wanted-prefill", *next_, WANTED[4:], shares(160), 45),
        Item("llava-more-prefill", *llava, WANTED[:8], (128, 192), 40),
        Item("qwen-more-prefill", *qwen, packed, (1 / 3,), 30),
        Item("next-more-prefill", *next_, WANTED[:4], shares(640), 25),
        Item("next-batches", *next_, WANTED[:1], shares(160), 60, ANSWERS, batch_sizes=(1, 8)),
        Item("next-others-prefill", *next_, rest, shares(160), 25),
        Item("qwen-large-more-prefill", *large, packed, (1 / 3,), 60),
        Item("qwen-answers", *qwen, WANTED[:1], (1 / 9,), 30, ANSWERS, new_tokens=(16, 256)),
    ]
