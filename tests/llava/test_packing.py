"""Where the package puts every feature row, learned by running its packing on numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from original import PLACEHOLDER

import tokprune
from tokprune.families import family_of
from tokprune.integrations.llava_v1.packing import pack

I = PLACEHOLDER  # noqa: E741
SIDE = 24
#: two images in one prompt, an image at the end, images that touch
ROWS = [[5, 6, I, 7, 8, 9, I], [4, I, I, 5]]
SIZES = [(40, 14), (14, 40), (45, 44), (72, 10)]  # (width, height)
TILES = [3, 3, 5, 4]


def batch(rows: list[list[int]], side: str = "left") -> tuple[torch.Tensor, torch.Tensor]:
    """ids and mask [B, L]."""
    longest = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        gap = [0] * (longest - len(row))
        ones = [1] * len(row)
        ids.append(gap + row if side == "left" else row + gap)
        mask.append(gap + ones if side == "left" else ones + gap)
    return torch.tensor(ids), torch.tensor(mask)


def pictures(kind: str, count: int = 4) -> Any:
    generator = torch.Generator().manual_seed(5)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, 3, SIDE, SIDE, generator=generator)

    return {
        "tiles": lambda: [some(n) for n in TILES[:count]],
        "one tile each": lambda: [some(1) for _ in range(count)],
        "plain list": lambda: [some() for _ in range(count)],
        "tensor": lambda: some(count),
        "tensor of tiles": lambda: some(count, 3),
    }[kind]()


@torch.no_grad()
def prepare(model: Any, ids: Any, mask: Any, images: Any, sizes: Any) -> tuple[Any, Any]:
    """Embeddings that the package makes, and the projector's output [tiles, F, D]."""
    seen: list[torch.Tensor] = []
    handle = model.model.mm_projector.register_forward_hook(lambda *call: seen.append(call[2]))
    made = model.prepare_inputs_labels_for_multimodal(ids, None, mask, None, None, images, sizes)
    handle.remove()
    return made, seen[0]


CONFIGS: dict[str, dict[str, Any]] = {
    "flat": {"mm_patch_merge_type": "flat"},
    "spatial": {"mm_patch_merge_type": "spatial"},
    "spatial_unpad": {},
    "right": {"tokenizer_padding_side": "right"},
    "text pinpoints": {"image_grid_pinpoints": "[(24, 48), (48, 24), (48, 48), (72, 24)]"},
    "with class token": {"mm_patch_merge_type": "flat", "mm_vision_select_feature": "cls_patch"},
}


@pytest.mark.parametrize(
    "kind", ["tiles", "one tile each", "plain list", "tensor", "tensor of tiles"]
)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("masked", [True, False])
def test_every_column_holds_the_feature_that_was_said(
    original: Callable[..., Any], config: str, kind: str, masked: bool
) -> None:
    model = original("anyres").build(**CONFIGS[config])
    ids, mask = batch(ROWS, CONFIGS[config].get("tokenizer_padding_side", "left"))
    if not masked:
        ids, mask = ids[:1], None
    images, sizes = pictures(kind), SIZES
    if kind == "tensor of tiles":
        sizes = [SIZES[0]] * 4
    family = family_of(model)
    facts = family.facts(model, family.parts(model)).tower
    assert facts is not None
    packed = pack(model, facts, ids, mask, images, sizes)
    made, projected = prepare(model, ids, mask, images, sizes)
    embeds, rows = made[4], facts.tokens_per_tile
    assert packed.prompt.segment.shape == embeds.shape[:2]
    assert torch.equal(packed.prompt.valid, torch.ones_like(packed.prompt.valid)
                       if made[2] is None else made[2] != 0)  # fmt: skip
    assert [len(row) for row in packed.prompt.columns] == [2, 2][: len(ids)]
    newline = getattr(model.model, "image_newline", projected.new_zeros(projected.shape[2]))
    features = torch.cat([projected.flatten(0, 1), newline[None]])
    first = [sum(layout.tiles for layout in packed.layouts[:i]) * rows for i in range(4)]
    visual = torch.zeros(embeds.shape[:2], dtype=torch.bool)
    for b, row in enumerate(packed.prompt.columns):
        for s, columns in enumerate(row):
            number = packed.prompt.image_of[b][s]
            own = packed.layouts[number].packed
            at = torch.where(own < 0, len(features) - 1, own + first[number])
            assert torch.equal(embeds[b, columns], features[at])
            assert torch.equal(packed.prompt.segment[b, columns], torch.full_like(columns, s))
            visual[b, columns] = True
    # what is left is text, in its order
    for b, row in enumerate(ids):
        text = row[(row != I) & (mask[b] != 0 if mask is not None else row == row)]
        rest = embeds[b][~visual[b] & packed.prompt.valid[b]]
        assert torch.equal(rest, model.model.embed_tokens(text))


def test_layouts_name_sizes_and_tile_grids(original: Callable[..., Any]) -> None:
    model = original("anyres").model
    family = family_of(model)
    parts = family.parts(model)
    call = {"images": pictures("tiles"), "image_sizes": SIZES}
    layouts = family.images(parts, family.facts(model, parts), call)
    assert [layout.size for layout in layouts] == [(14, 40), (40, 14), (44, 45), (10, 72)]
    assert [layout.tile_grid for layout in layouts] == [(1, 2), (2, 1), (2, 2), (1, 3)]
    assert [layout.tiles for layout in layouts] == TILES


def test_a_row_without_image_takes_one_as_in_the_package(original: Callable[..., Any]) -> None:
    model = original("anyres").model
    ids, mask = batch([[5, 6, 7], [4, I, 5]])
    images, sizes = pictures("tiles", 2), SIZES[:2]
    with torch.no_grad():
        want = model(ids, mask, images=images, image_sizes=sizes).logits[0, -3:]
        with tokprune.compress(model, "flowcut", keep=9) as trace:
            got = model(ids, mask, images=images, image_sizes=sizes).logits
    assert trace.last is not None
    assert [i.record.layout.tiles for i in trace.last.images if i.record] == [3]
    assert trace.last.layers[-1].counts == [[], [9]]
    torch.testing.assert_close(got[0, -3:], want)


def test_too_few_images_are_refused(original: Callable[..., Any]) -> None:
    model = original("square").model
    ids, mask = batch([[5, I, 6, I], [4, 5]])
    with tokprune.compress(model, "grid", keep=9), torch.no_grad():
        with pytest.raises(tokprune.PromptMismatchError, match="takes 3 image"):
            model(ids, mask, images=pictures("tensor", 2))


def test_missing_sizes_are_named(original: Callable[..., Any]) -> None:
    model = original("anyres").model
    ids, _ = batch([[5, I, 6]])
    with tokprune.compress(model, "grid", keep=9), torch.no_grad():
        with pytest.raises(ValueError, match="image_sizes is missing"):
            model(ids, images=pictures("tiles", 1))


def test_a_limit_that_cuts_text_only_is_followed(original: Callable[..., Any]) -> None:
    form = original("square")
    model = form.build(tokenizer_model_max_length=45)
    ids, mask = batch([[5, 6, I, *range(10, 40)], [4, I, 5]])
    with torch.no_grad():
        full = model(ids, mask, images=pictures("tensor", 2)).logits
        with tokprune.compress(model, "grid", keep=9) as trace:
            model(ids, mask, images=pictures("tensor", 2))
    assert full.shape[1] == 45
    assert trace.last is not None
    assert trace.last.original_lengths == [45, 38]
    assert trace.last.layers[0].lengths == [45 - 27, 38 - 27]


def test_a_limit_that_cuts_an_image_is_refused(original: Callable[..., Any]) -> None:
    form = original("square")
    model = form.build(tokenizer_model_max_length=30)
    ids, _ = batch([[5, 6, I, 7]])
    with tokprune.compress(model, "grid", keep=9), torch.no_grad():
        with pytest.raises(tokprune.PromptMismatchError, match="tokenizer_model_max_length=30"):
            model(ids, images=pictures("tensor", 1))


@pytest.mark.parametrize("case", ["flowcut", "visionzip", "fastv", "pitome"])
def test_class_token_among_the_features(original: Callable[..., Any], case: str) -> None:
    """``mm_vision_select_feature='cls_patch'``: 37 rows an image."""
    form = original("square")
    model = form.build(mm_vision_select_feature="cls_patch")
    ids, mask = batch([[5, I, 6], [4, 7, I, 5]])
    with tokprune.compress(model, case, keep=9) as trace, torch.no_grad():
        logits = model(ids, mask, images=pictures("tensor", 2)).logits
    assert trace.last is not None
    assert trace.last.original_counts == [37, 37]
    assert max(map(sum, trace.last.layers[-1].counts)) <= 10
    assert bool(logits.isfinite().all())
