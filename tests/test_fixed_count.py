"""What a method says it will leave of an image, by its layout alone, is what enters the decoder."""

from __future__ import annotations

from typing import Any

import pytest
from family_cases import METHODS, case_of

from tokprune.errors import CompositionError, UnsupportedModelError
from tokprune.methods import available_methods, make_method

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: own for name, own in METHODS.items() if own[0] != "evs"},
    "divprune-all": ("divprune", {"keep": 1.0}), "divprune-few": ("divprune", {"keep": 0.6}),
    "grid-all": ("grid", {"keep": 1.0}), "visionzip-keep": ("visionzip", {"keep": 0.3}),
    "visionzip-all": ("visionzip", {"keep": 1.0}), "prunesid-all": ("prunesid", {"keep": 1.0}),
    "fastervlm-published": ("fastervlm", {"keep": 0.5, "order": "published"}),
    "vispruner-image": ("vispruner", {"keep": 31, "scope": "image"}),
    "score-all": ("score", {"keep": 1.0}), "pool-before": ("pool", {"keep": 9, "place": "before"}),
    "todre-alone": ("todre", {"keep": 5, "stage2": False}),
    "hired-floor": ("hired", {"keep": 0.4, "rounding": "floor"}),
    "prumerge-plain": ("prumerge", {"keep": 0.4}), "prumerge-adaptive": ("prumerge", {}),
}  # fmt: skip
#: one tile; crops stitched, with and without padding; crops shrunk; grids of an image's own; tiles
FAMILIES = ("llava-1.5", "llava-next", "llava-onevision", "qwen2.5-vl", "internvl")
#: methods whose number is the setting's and the layout's
KNOWN = {
    "cdpruner", "divprune", "fastervlm", "grid", "hiprune", "hired", "holov", "m3", "msdg", "pool",
    "prumerge", "prunesid", "random", "scope", "score", "todre", "vispruner", "visionzip",
}  # fmt: skip


def counts(name: str, family: str) -> list[tuple[int | None, int]]:
    """Of several images the number that is told, and the one that enters the decoder."""
    method, options = CASES[name]
    case = case_of(make_method(method, **options), family, [[4, "image", 6], [3, "image", 2]])
    sizes = None if case.family.sizes else [(36, 24), (30, 70)]
    case = case.having(sizes=sizes)
    _, prefill = case.prefill(case.inputs())
    made = case.method.on(prefill.facts)
    found = []
    for image in prefill.images:
        assert image.record is not None
        assert image.entered is not None
        told = made.fixed_count(prefill.facts, image.record.layout)
        found.append((told, image.entered.count))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_number_is_told(family: str) -> None:
    wrong, told = {}, set()
    for name, (method, _) in CASES.items():
        try:
            found = counts(name, family)
        except (UnsupportedModelError, CompositionError, ValueError):
            continue  # the family is none for it
        if any(own is not None and own != left for own, left in found):
            wrong[name] = found
        if all(own is not None for own, _ in found):
            told.add(method)
    assert not wrong
    assert told - {"centerclip"} <= KNOWN
    assert len(told) >= (12 if family == "internvl" else 14)


def test_methods_by_the_image_tell_nothing() -> None:
    for name in ("prumerge-adaptive", "hired-floor"):
        assert all(told is None for told, _ in counts(name, "llava-next"))
    assert set(available_methods()) >= KNOWN
