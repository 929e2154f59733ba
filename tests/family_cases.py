"""What the suites about families share: method cases, prompts, models."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from flash_double import flash_double

import tokprune
from tokprune.errors import UnsupportedModelError
from tokprune.families import bind
from tokprune.methods import Method, make_method
from tokprune.testing import Case, TinyFamily, continuation_tokens, tiny_family
from tokprune.testing.case import Prompts
from tokprune.testing.families import BUILT_IN, REPRESENTATIVE
from tokprune.testing.generated import forced_logits
from tokprune.testing.hybrid import is_hybrid
from tokprune.trace import PrefillTrace

FLASH = "flash_attention_2"
BACKENDS = ("eager", "sdpa", FLASH)
FAMILIES = BUILT_IN

#: by name; layers fit decoders of six, and some kept tokens leave whole rows and columns of a grid
#: empty, so that "compact" is not "preserve"
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "random": ("random", {"keep": 5}),
    "random-compact": ("random", {"keep": 4, "positions": "compact"}),
    "random-preserve": ("random", {"keep": 4, "positions": "preserve"}),
    "grid": ("grid", {"keep": 5}),
    "divprune": ("divprune", {"keep": 4}),
    "divprune-published": ("divprune", {"keep": 0.4, "order": "published"}),
    "divprune-rectified": ("divprune", {"keep": 4, "rectify": "size"}),
    "divprune-anchors": (
        "divprune", {"keep": 6, "anchors": 0.5, "positions": "preserve", "rectify": "size"},
    ),
    "vispruner-anchors": ("vispruner", {"keep": 5, "anchors": {"share": 0.3, "place": "last"}}),
    "cdpruner": ("cdpruner", {"keep": 5}),
    "cdpruner-text": ("cdpruner", {"keep": 5, "relevance": "text"}),
    "mmtok": ("mmtok", {"keep": 5}),
    "msdg": ("msdg", {"keep": 5, "groups": 3}),
    "centerclip": ("centerclip", {"keep": 4}),
    "centerclip-encoder": ("centerclip", {"keep": 4, "place": "encoder"}),
    "centerclip-projector": ("centerclip", {"keep": 4, "place": "projector"}),
    "fastv": ("fastv", {"keep": 4, "prune_before": 2}),
    "fastv-compact": ("fastv", {"keep": 4, "prune_before": 1, "positions": "compact"}),
    "fastv-rectified": ("fastv", {"keep": 4, "prune_before": 2, "rectify": "size+distance"}),
    "fastv-text": ("fastv", {"keep": 0.3, "prune_before": 3, "rows": "text"}),
    "pyramiddrop": ("pyramiddrop", {"keep": 3, "prune_before": (1, 3)}),
    "pyramiddrop-preserve": (
        "pyramiddrop", {"keep": 3, "prune_before": (2, 4), "positions": "preserve"},
    ),
    "dart": ("dart", {"keep": 6, "prune_before": 2, "image_pivots": 2, "text_pivots": 2}),
    "dart-norm": (
        "dart",
        {
            "keep": 6, "prune_before": 1, "image_pivots": 2, "text_pivots": 2,
            "pivot_order": "norm", "positions": "compact",
        },
    ),
    "todre": ("todre", {"keep": 5, "tau": 0.3, "prune_before": 4}),
    "sparsevlm": ("sparsevlm", {"keep": 4, "prune_before": (2, 4), "recycle": 0}),
    "sparsevlm-plus": (
        "sparsevlm",
        {"keep": 4, "prune_before": (1, 3), "recycle": 0, "version": "plus", "heads": 2},
    ),
    "sparsevlm-recycled": ("sparsevlm", {"keep": 4, "prune_before": (1, 4), "recycle": 0.5}),
    "transprune": (
        "transprune", {"keep": 4, "prune_before": (2, 3, 5), "transition_layers": (1, 2, 3, 4)},
    ),
    "v2drop": ("v2drop", {"keep": 4, "prune_before": (1, 2)}),
    "priortr": ("priortr", {"keep": 4, "prune_before": 2}),
    "priortr-caches": (
        "priortr",
        {"keep": 4, "prune_before": 3, "cut_earlier_caches": True, "positions": "compact"},
    ),
    "clse": ("clse", {"keep": 4, "prune_before": (1, 3)}),
    "clse-caches": ("clse", {"keep": 4, "prune_before": (2, 3), "cut_earlier_caches": True}),
    "sieve": ("sieve", {"keep": 4, "prune_before": 2, "heads": 2}),
    "mustdrop": (
        "mustdrop", {"spatial": False, "key_rate": 0.0, "keep": 4, "prune_before": (2, 4)},
    ),
    "mustdrop-continue": (
        "mustdrop",
        {
            "spatial": False, "key_rate": 0.0, "keep": 4, "prune_before": (2, 4),
            "decode_positions": "continue", "positions": "preserve",
        },
    ),
    "fastervlm": ("fastervlm", {"keep": 5}),
    "vispruner": ("vispruner", {"keep": 5}),
    "scope": ("scope", {"keep": 5}),
    "score": ("score", {"keep": 5}),
    "hiprune": ("hiprune", {"keep": 4, "alpha": 1.0}),
    "prunesid": ("prunesid", {"keep": 5}),
    "prunesid-patches": ("prunesid", {"keep": 5, "keep_cls": False, "order": "spatial"}),
    "hired": ("hired", {"keep": 5}),
    "holov": ("holov", {"keep": 5}),
    "flowcut": ("flowcut", {"keep": 12, "decoder_cut": False}),
    "pitome": ("pitome", {"keep": 20}),
    "tome": ("tome", {"r": 4}),
    "apet": ("apet", {"keep": 6, "basis": 2, "decoder_keep": 4, "prune_before": 3}),
    "ficoco": ("ficoco", {"keep": 6, "quantile": 0.8}),
    "ficoco-decoder": ("ficoco", {"keep": 4, "place": "decoder", "quantile": 0.8}),
    "visionzip": ("visionzip", {"dominant": 3, "contextual": 2}),
    "vscan": ("vscan", {"keep": 3, "prune_before": 3}),
    "tops": ("tops", {"keep": 4, "prune_before": (2, 4)}),
    "tops-raters": ("tops", {"keep": 4, "prune_before": (1, 3), "raters": "sparsevlm"}),
    "prumerge": ("prumerge", {"keep": 4, "plus": True, "neighbours": 3}),
    "trim": ("trim", {"keep": 5}),
    "occamtoken": (
        "occamtoken", {"lambda1": 2.5, "neurons": ((0, 3), (1, 7)), "prune_before": 3},
    ),
    "pool": ("pool", {"window": 3}),
    "m3": ("m3", {"keep": 1, "positions": "preserve"}),
    "evs": ("evs", {"keep": 0.4}),
}  # fmt: skip
#: other layers where only the fourth and the last of eight have attention, by method
HYBRID: dict[str, dict[str, Any]] = {
    "fastv": {"prune_before": 4},
    "dart": {"prune_before": 4},
    "sieve": {"prune_before": 4},
    "pyramiddrop": {"prune_before": (3, 7)},
    "sparsevlm": {"prune_before": (4,)},
    "tops": {"prune_before": (4,)},
    "transprune": {"prune_before": (3,), "transition_layers": (1, 2)},
    "mustdrop": {"prune_before": (4,)},
    "priortr": {"prune_before": 4},
    "clse": {"prune_before": (4,)},
}
#: cases whose stages are in the vision encoder: families without such a place refuse them
IN_TOWER = {
    "centerclip-encoder", "centerclip-projector", "ficoco", "flowcut", "msdg", "mustdrop",
    "occamtoken", "pitome", "tome", "todre", "visionzip",
}  # fmt: skip
#: cases of methods that drop of videos alone
OF_VIDEOS = {"evs"}

#: prompts by shape; the batch has rows of different lengths and images, one of them text alone
SHAPES: dict[str, Prompts] = {
    "single": [[4, "image", 6]],
    "ragged": [[4, "image", 6], [7, "image", 9], [2, "image", 3], [5]],
    "two": [[4, "image", 2, "image", 6]],
    "turn": [[4, "image", 6], [3, "image", 11]],
    "video": [[4, "video", 6], [3, "video", 5]],
}
STEPS = 3
TURN = 4


@dataclass(frozen=True)
class Cell:
    """One case of the product."""

    method: str
    family: str
    backend: str
    shape: str

    def __str__(self) -> str:
        return f"{self.method}-{self.family}-{self.backend}-{self.shape}"


def possible(cell: Cell) -> bool:
    """Whether there is such a case at all: the rest has nothing that could be compared."""
    tiny = tiny_family(cell.family)
    if cell.shape == "video" and not tiny.videos:
        return False
    if cell.method in OF_VIDEOS and cell.shape != "video":
        return False
    return cell.backend == FLASH or cell.backend in tiny.backends


def product() -> list[Cell]:
    cells = (
        Cell(m, f, b, s) for m in METHODS for f in FAMILIES for b in BACKENDS for s in SHAPES
    )  # fmt: skip
    return [cell for cell in cells if possible(cell)]


def pairs_of(cell: Cell) -> list[tuple[str, str]]:
    """The cover holds every possible pair of these: method (options in turn) and family, where the
    family is one of those that together exercise everything; family and backend, family and shape,
    case of a method and shape."""
    pairs = [(cell.family, cell.backend), (cell.family, cell.shape), (cell.method, cell.shape)]
    if cell.family in REPRESENTATIVE:
        pairs.append((METHODS[cell.method][0], cell.family))
    return pairs


def cover(cells: Iterable[Cell]) -> list[Cell]:
    """Few of ``cells`` in which every pair of :func:`pairs_of` appears; the same every time."""
    by_pair: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        for pair in pairs_of(cell):
            by_pair.setdefault(pair, []).append(cell)
    left = dict.fromkeys(by_pair)  # ordered
    chosen: list[Cell] = []
    used: Counter[tuple[str, ...]] = Counter()

    def worth(cell: Cell) -> tuple[int, int]:
        new = sum(pair in left for pair in pairs_of(cell))
        # where both add as much, what was taken less often
        return new, -used[cell.method, ""] - 2 * used[cell.backend, cell.shape]

    for pair in by_pair:
        if pair in left:
            best = max(by_pair[pair], key=worth)
            chosen.append(best)
            used.update([(best.method, ""), (best.backend, best.shape)])
            for own in pairs_of(best):
                left.pop(own, None)
    return chosen


@functools.cache
def model_of(family: str, backend: str) -> Any:
    """A tiny model, made once; call it for flash attention while the double is installed."""
    return tiny_family(family).build(attention=backend)


def plain_backend(family: str) -> str:
    """A backend beside flash attention, for the oracle."""
    return tiny_family(family).backends[-1]


def case_of(method: Method | str, family: str, prompts: Prompts, model: Any = None) -> Case:
    tiny: TinyFamily = tiny_family(family)
    model = model or model_of(family, plain_backend(family))
    if isinstance(method, str):
        name, options = METHODS[method]
        changes = HYBRID.get(name, {}) if is_hybrid(model) else {}
        if name == "flowcut" and bind(model).facts.packed:  # twice the budget leaves the encoder
            changes = {"keep": 3}
        method = make_method(name, **{**options, **changes})
    return Case(method, tiny, model, prompts)


@functools.cache
def unpatched_difference(family: str, shape: str) -> float:
    """By what share of the largest logit the unpatched model differs under flash attention from
    itself under another backend: kernels round differently. Infinite where it fails."""
    case = case_of("random", family, SHAPES[shape])
    inputs, tokens = case.inputs(), continuation_tokens(len(case.prompts), STEPS)
    want = forced_logits(case.model, inputs, tokens)
    try:
        got = forced_logits(model_of(family, FLASH), inputs, tokens)
    except Exception:  # whatever transformers, or the double, falls over
        return float("inf")
    return float((got - want).abs().max() / want.abs().max().clamp(min=1))


def refusal_of_flash(family: str) -> str | None:
    """What a family says to flash attention, None where it takes it. Call while the double is
    installed."""
    try:
        model = model_of(family, FLASH)
    except ValueError as error:  # transformers itself has none for this architecture
        return str(error)
    try:
        with tokprune.compress(model, "random", keep=4):
            pass
    except UnsupportedModelError as error:
        return str(error)
    return None


def in_window(family: str) -> bool:
    """Whether some layers see a window that is shorter than the prompts here."""
    blocks = bind(model_of(family, plain_backend(family))).parts.decoder_layers
    return any(block.window is not None and block.window < 40 for block in blocks)


def has_gaps(prefill: PrefillTrace) -> bool:
    """Whether tokens went and positions stayed, at the end of the prefill or in the cache."""
    if any(n < m for seen in prefill.layers for n, m in zip(seen.cached, seen.lengths)):
        return True
    last = prefill.layers[-1]
    for b in range(len(last.column)):
        real = last.column[b] >= 0
        place = last.position[..., b, :][..., real]
        if place.dim() == 1 and bool((place.diff() > 1).any()):
            return True
    return False


def double_installed() -> Iterator[None]:
    """For a module-wide fixture: the double of flash attention, and models made under it."""
    with ExitStack() as stack:
        stack.enter_context(flash_double())
        yield
    model_of.cache_clear()
    unpatched_difference.cache_clear()
