"""What the bench of a GPU check measures, most wanted first."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

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
    #: seconds wanted, in a run of nine minutes
    weight: float
    parts: tuple[str, ...] = PREFILL
    batch_sizes: tuple[int, ...] = (1,)
    new_tokens: tuple[int, ...] = (16,)
    text_tokens: int = 64
    #: rounds after which nothing gets better
    rounds: int = 11

    @property
    def trials(self) -> int:
        return len(self.methods) * len(self.keeps)

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
    """In order.

    Args:
        every_method: names of all methods for images.
    """
    rest = tuple(name for name in every_method if name not in WANTED)
    leading = WANTED[:4]
    # shapes whose encoder packs images of any size have no class token and no rows to merge
    packed = ("divprune", "fastv", "cdpruner", "pyramiddrop", "sparsevlm", "dart")
    thirds = (1 / 3, 1 / 9)
    next_, llava = ("llava-next-7b", 2880), ("llava-1.5-7b", 576)
    qwen, large = ("qwen2.5-vl-7b", 1296), ("qwen2.5-vl-7b-1792px", 4096)
    answers: dict[str, Any] = {"parts": ANSWERS, "batch_sizes": (1, 8)}
    return [
        Item("next-prefill", *next_, leading, (320, 160, 640), 60),
        Item("next-answers", *next_, ("divprune",), (160,), 60, new_tokens=(16, 256), **answers),
        Item("llava-prefill", *llava, WANTED[:8], (64, 128, 192), 50),
        Item("qwen-prefill", *qwen, packed, thirds, 30),
        Item("video", "qwen3-vl-8b-video", 16384, ("divprune",), (0.25,), 45, ANSWERS),
        Item("qwen-large-prefill", *large, packed, thirds, 35),
        Item("llava-answers", *llava, ("divprune", "visionzip", "fastv"), (64,), 40, **answers),
        Item("next-wanted-prefill", *next_, WANTED[4:], (320,), 30),
        Item("llava-others-prefill", *llava, (*WANTED[8:], *rest), (64,), 25),
        Item("next-others-prefill", *next_, rest, (320,), 15),
        Item("qwen-answers", *qwen, ("divprune",), (1 / 3,), 20, ANSWERS),
    ]
