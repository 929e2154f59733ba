"""What must hold for a family: parts, facts and layouts against what its model does."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from tokprune.engine.family import BoundModel
from tokprune.engine.model import ImageLayout
from tokprune.families import bind
from tokprune.testing.case import Case
from tokprune.testing.report import Fault


def binds(model: Any) -> str:
    """The family gives the modules that are hooked."""
    bound = bind(model)
    parts = bound.parts
    inside = {id(module) for module in model.modules()}
    for name in ("multimodal", "tower", "projector", "language_model"):
        if id(getattr(parts, name)) not in inside:
            raise Fault(f"parts.{name} is no module of the model")
    for name in ("encoder_layers", "decoder_layers"):
        layers = getattr(parts, name)
        if not layers or any(id(layer) not in inside for layer in layers):
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
    _equal("encoder_layers", facts.encoder_layers, len(parts.encoder_layers), "the tower has")
    _equal("decoder_layers", facts.decoder_layers, len(parts.decoder_layers), "the decoder has")
    _equal("videos", facts.videos, parts.video_token_id is not None, "parts.video_token_id says")
    if facts.feature_layer is not None and not 0 <= facts.feature_layer < facts.encoder_layers:
        raise Fault(
            f"facts.feature_layer is {facts.feature_layer}; it should be a layer of the tower (0 "
            f"to {facts.encoder_layers - 1}), or None"
        )
    seen = _forward(case, case.inputs())
    rows = facts.patches + int(facts.has_cls)
    _equal("grid and facts.has_cls", rows, seen["tower"].shape[1], "rows of a tile in the tower:")
    _equal("tokens_per_tile", facts.tokens_per_tile, seen["projector"].shape[1], "projected rows:")
    most = max(len(layout.packed) for layout in _layouts(bound, case.inputs()))
    if most > facts.max_visual_tokens:
        raise Fault(
            f"facts.max_visual_tokens is {facts.max_visual_tokens}, but an image has {most} tokens"
        )
    return f"{facts.patches} patches a tile, {facts.decoder_layers} decoder layers, as in a forward"


def _layouts(bound: BoundModel, inputs: dict[str, Tensor]) -> list[ImageLayout]:
    """Images, then videos, of a batch."""
    found: list[ImageLayout] = []
    if "pixel_values" in inputs:
        found += bound.family.layouts(
            bound.parts, inputs["pixel_values"], inputs.get("image_sizes"), bound.facts,
            inputs.get("batch_num_images"),
        )  # fmt: skip
    if "pixel_values_videos" in inputs:
        found += bound.family.video_layouts(bound.parts, inputs["pixel_values_videos"], bound.facts)
    return found


@torch.no_grad()
def _forward(case: Case, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What goes through the unpatched model: rows of the first ``tower`` block [tiles, T, D],
    output of the ``projector`` [tiles, F, D], ``embeds`` [B, L, D] that enter the decoder."""
    parts = bind(case.model).parts
    seen: dict[str, Tensor] = {}

    def keep(name: str, value: Any) -> None:
        seen.setdefault(name, value[0] if isinstance(value, tuple) else value)

    with ExitStack() as stack:
        for handle in (
            parts.encoder_layers[0].register_forward_hook(lambda m, a, out: keep("tower", out)),
            parts.projector.register_forward_hook(lambda m, a, out: keep("projector", out)),
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
        tokens = [len(layout.packed) for layout in _layouts(bind(own.model), inputs)]
        found = int(bind(own.model).parts.visual(inputs["input_ids"]).sum())
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
    inputs = case.inputs()
    layouts, seen = _layouts(bound, inputs), _forward(case, inputs)
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
