"""What must hold for a family: parts, facts and layouts against what its model does."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from tokprune.families import bind
from tokprune.testing.case import Case
from tokprune.testing.report import Fault
from tokprune.trace.costs import images_of_rows


def binds(model: Any) -> str:
    """The family gives the modules that are hooked."""
    bound = bind(model)
    parts = bound.parts
    inside = {id(module) for module in model.modules()}
    named = {"multimodal": parts.multimodal, "language_model": parts.language_model}
    layers = {"decoder_layers": [block.module for block in parts.decoder_layers]}
    if parts.tower is not None:
        named |= {"tower.module": parts.tower.module, "tower.projector": parts.tower.projector}
        layers["tower.layers"] = parts.tower.layers
    for name, module in named.items():
        if id(module) not in inside:
            raise Fault(f"parts.{name} is no module of the model")
    for name, modules in layers.items():
        if not modules or any(id(module) not in inside for module in modules):
            raise Fault(f"parts.{name} should be the blocks of the model, at least one")
    return f"{type(model).__name__}: family {bound.family.name!r}"


def _equal(what: str, fact: Any, seen: Any, source: str) -> None:
    if fact != seen:
        raise Fault(f"facts.{what} is {fact!r}, but {source} {seen!r}")


def facts_are_true(case: Case) -> str:
    """The facts are what a forward of the model shows."""
    bound = bind(case.model)
    facts, parts = bound.facts, bound.parts
    _equal("family", facts.family, bound.family.name, "the family's name is")
    _equal("decoder_layers", facts.decoder_layers, len(parts.decoder_layers), "the decoder has")
    _equal("videos", facts.videos, parts.video_token_id is not None, "parts.video_token_id says")
    most = max(len(layout.packed) for row in images_of_rows(bound, case.inputs()) for layout in row)
    if most > facts.max_visual_tokens:
        raise Fault(
            f"facts.max_visual_tokens is {facts.max_visual_tokens}, but an image has {most} tokens"
        )
    tower = facts.tower
    if tower is None:
        if parts.tower is not None or not facts.no_tower:
            raise Fault("facts.tower is None: parts.tower should be, too, and no_tower say why")
        return f"{facts.decoder_layers} decoder layers, as in a forward"
    assert parts.tower is not None
    _equal("tower.encoder_layers", tower.encoder_layers, len(parts.tower.layers), "the tower has")
    if tower.feature_layer is not None and not 0 <= tower.feature_layer < tower.encoder_layers:
        raise Fault(
            f"facts.tower.feature_layer is {tower.feature_layer}; it should be a layer of the "
            f"tower (0 to {tower.encoder_layers - 1}), or None"
        )
    seen, rows = _forward(case, case.inputs()), tower.patches + int(tower.has_cls)
    _equal("tower.grid and has_cls", rows, seen["tower"].shape[1], "rows of a tile in the tower:")
    shown = seen["projector"].shape[1]
    _equal("tower.tokens_per_tile", tower.tokens_per_tile, shown, "projected rows:")
    return f"{tower.patches} patches a tile, {facts.decoder_layers} decoder layers, as in a forward"


@torch.no_grad()
def _forward(case: Case, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What goes through the unpatched model: rows of the first ``tower`` block [tiles, T, D],
    output of the ``projector`` [tiles, F, D], ``embeds`` [B, L, D] that enter the decoder."""
    parts = bind(case.model).parts
    assert parts.tower is not None
    seen: dict[str, Tensor] = {}

    def keep(name: str, value: Any) -> None:
        seen.setdefault(name, value[0] if isinstance(value, tuple) else value)

    with ExitStack() as stack:
        for handle in (
            parts.tower.layers[0].register_forward_hook(lambda m, a, out: keep("tower", out)),
            parts.tower.projector.register_forward_hook(lambda m, a, out: keep("projector", out)),
            parts.language_model.register_forward_pre_hook(
                lambda m, a, kwargs: keep("embeds", kwargs["inputs_embeds"]), with_kwargs=True
            ),
        ):
            stack.callback(handle.remove)
        case.model(**inputs)
    return seen


def layouts_fit(case: Case, sizes: list[tuple[int, int]]) -> str:
    """The model takes prompts with as many placeholders as the layouts have tokens, for images of
    every one of ``sizes`` (height, width) alone, and for the case's batch.

    The model itself compares the placeholders of a prompt with its features.
    """
    counts = []
    single = [case.having(prompts=[[2, "image", 3]], sizes=[size]) for size in sizes]
    for own in [*single, case]:
        inputs = own.inputs()
        bound = bind(own.model)
        tokens = [len(x.packed) for row in images_of_rows(bound, inputs) for x in row]
        found = int((bound.family.placeholders(bound.parts, inputs) > 0).sum())
        if found != sum(tokens):
            raise Fault(
                f"the prompt of images {own.sizes} has {found} placeholders, the layouts "
                f"{tokens} tokens"
            )
        try:
            with torch.no_grad():
                own.model(**inputs)
        except (ValueError, RuntimeError) as error:
            raise Fault(
                f"the model itself does not take {tokens} placeholder tokens, which the layouts "
                f"say, for images {own.sizes}: {error}"
            ) from error
        counts += tokens
    return f"{len(counts)} images or videos of {min(counts)} to {max(counts)} tokens"


def packs_in_order(case: Case) -> str:
    """Each prompt token has the feature that the layout says it takes."""
    bound = bind(case.model)
    if bound.parts.tower is None:
        return "not checked: no stage works in the tower, and its features come in order"
    inputs = case.inputs()
    rows_, seen = images_of_rows(bound, inputs), _forward(case, inputs)
    # images of all rows, then videos, as the projector sees them
    layouts = [x for kind in (False, True) for row in rows_ for x in row if x.video is kind]
    visual = bound.parts.visual(inputs["input_ids"])
    tokens, features = seen["embeds"][visual], seen["projector"]
    tiles = sum(layout.tiles for layout in layouts)
    if tiles != features.shape[0]:
        raise Fault(f"the layouts have {tiles} tiles, the projector saw {features.shape[0]}")
    newline = bound.family.newline(bound.parts)
    start = tile = compared = 0
    for number, layout in enumerate(layouts):
        packed = layout.packed
        own = tokens[start : start + len(packed)]
        rows = features[tile : tile + layout.tiles].flatten(0, 1)
        start, tile = start + len(packed), tile + layout.tiles
        if layout.token_grid is not None:
            continue  # the model pools its cells: no token is a row of the projector
        if (packed < 0).any() and newline is None:
            raise Fault(f"the layout of image {number} has newline tokens, family.newline is None")
        want = rows[packed.clamp(min=0)]
        if newline is not None:
            want = torch.where(packed[:, None] < 0, newline.to(want.dtype), want)
        wrong = (own != want).any(1).nonzero().flatten().tolist()
        if wrong:
            raise Fault(
                f"image {number} ({layout.size}): {len(wrong)} of {len(packed)} prompt tokens do "
                f"not have the feature that layout.packed says, the first at {wrong[0]} (packed "
                f"{int(packed[wrong[0]])})"
            )
        compared += len(packed)
    return f"{compared} tokens of {len(layouts)} images are the projected rows that they should be"
