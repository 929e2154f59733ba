"""ToMe: bipartite soft matching in every layer of the vision encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

from tokprune.methods.base import Preset
from tokprune.methods.merging import LayerMerger
from tokprune.methods.merging.schedule import (
    Step,
    Steps,
    check_reachable,
    merging_layers,
    rows_left,
    steps_removing,
    trim,
)
from tokprune.methods.merging.stage import Recipe
from tokprune.methods.options import Range, check_range, is_whole
from tokprune.methods.registry import register_method
from tokprune.operators.bipartite import parse_r

Variant = Literal["official", "pitome_baseline", "pitome_baseline_head"]

_ROWS = "ToMe rows of PiToMe's logs (llava_w_ratio.csv): ratio {} leaves {} patches"
_LOGGED = {0.85: 98, 0.875: 134, 0.9: 183, 0.925: 246, 0.95: 331}
_PORT = "LightCompress port of ToMe to LLaVA: r = 16, no proportional attention, 208 patches"


def _check_removals(r: Any, name: str) -> None:
    """A count, (count, inflect) or a list of counts."""
    counts = [r]
    if isinstance(r, tuple) and len(r) == 2:
        check_range(r[1], f"{name}[1] (inflect)", -1.0, 1.0)
        counts = [r[0]]
    elif isinstance(r, Sequence) and not isinstance(r, (str, tuple)):
        counts = list(r)
    if not all(is_whole(n) and n >= 0 for n in counts):
        raise ValueError(
            f"{name}={r!r} should be a count of tokens ≥ 0, a pair (count, inflect), or a list of "
            "counts"
        )


Removals: TypeAlias = Annotated[int | tuple[int, float] | Sequence[int], _check_removals]


def _logged(ratio: float, left: int) -> Preset:
    options = {"ratio": ratio, "variant": "pitome_baseline"}
    return Preset("llava-1.5", f"r={ratio}", options, _ROWS.format(ratio, left))


@register_method
@dataclass(frozen=True)
class ToMe(LayerMerger):
    """In every layer, the even tokens that resemble an odd token most merge into it.
    Text-agnostic; the class token is never merged.

    Variants: ``official``: between attention and MLP, compared by the head mean of the layer's
    keys, means weighted by token size, proportional attention from the second merging layer on
    (needs sdpa or eager attention). ``pitome_baseline``, the ToMe rows of PiToMe's LLaVA tables:
    after every odd layer, compared by the hidden state, plain means, driven by a ratio;
    ``pitome_baseline_head``: the same after every layer.

    Merging stops at the layer whose output the model reads. All tiles of a batch keep the same
    number; on tiled models each tile is merged on its own and newline tokens go.

    Args:
        r: tokens that each layer removes: a number, (r, inflect), or one number a layer; a layer
            removes at most half of its tokens. Give one of ``r``, ``keep``, ``ratio``.
        keep: tokens left of each tile (count) or fraction; the same r everywhere (bent by
            ``inflect``; for the baselines a ratio), trimmed in the last layers to hit it exactly.
        ratio: fraction that each merging layer keeps, 0.5 … 1 (baseline variants).
        inflect: schedule of ``r``: 0 constant, −1 falling from 2r to 0, +1 rising.
        prop_attn: proportional attention (official variant).
        variant: "official", "pitome_baseline" or "pitome_baseline_head".
        order: of the tokens in the prompt, "published" (as they leave the tower) or "spatial".
        positions: "compact" renumbers the shortened prompt, "preserve" keeps the original ids.
        scope: what ``keep`` counts on tiled models: "tile", or "image" to share it between the
            most tiles that an image can have.

    Source: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, arXiv 2210.09461.
    """

    name = "tome"
    needs = "keys of the merging layers"
    paper = "arXiv 2210.09461"
    presets = (
        *(_logged(ratio, left) for ratio, left in _LOGGED.items()),
        Preset("llava-1.5", 208, {"r": 16, "prop_attn": False}, _PORT),
    )

    one_of = ("r", "keep", "ratio")
    budget_options = frozenset(one_of)
    variants = ({"variant": "pitome_baseline"},)

    r: Removals | None = None
    inflect: Annotated[float, Range(-1.0, 1.0)] = 0.0
    prop_attn: bool = True
    variant: Variant = "official"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratio is not None and self.variant == "official":
            raise ValueError(
                f"ratio={self.ratio} drives the baseline variants; with variant='official' "
                "give r or keep"
            )
        if self.inflect and self.r is not None and not is_whole(self.r):
            raise ValueError(
                f"inflect={self.inflect} bends a single r; r={self.r!r} is a schedule already"
            )

    @property
    def recipe(self) -> Recipe:
        if self.variant != "official":
            return Recipe("after", "hidden")
        return Recipe("between", "keys", weighted=True, prop_attn=self.prop_attn)

    def rules(self, encoder_layers: int, last_layer: int) -> Steps:
        odd = self.variant == "pitome_baseline"
        return tuple(Step(layer) for layer in merging_layers(last_layer, self.variant, odd))

    def schedule(
        self, tokens: int, class_token: bool, encoder_layers: int, last_layer: int,
        left: int | None = None,
    ) -> Steps:  # fmt: skip
        """As for all mergers; by ``r`` where it is given, and official down to ``left`` rows by
        the smallest r that leaves no more than those.

        Raises:
            ValueError: ``left`` cannot be reached, or ``r`` lists more layers than there are.
        """
        if self.r is None and self.variant != "official":
            return super().schedule(tokens, class_token, encoder_layers, last_layer, left)
        rules = self.rules(encoder_layers, last_layer)

        def removing(r: int | tuple[int, float] | Sequence[int]) -> Steps:
            counts = parse_r(encoder_layers, (r, self.inflect) if isinstance(r, int) else r)
            return steps_removing(rules, tokens, class_token, lambda rule, _: counts[rule.layer])

        if self.r is not None:
            listed = 0 if isinstance(self.r, (int, tuple)) else len(self.r)
            if listed > encoder_layers:
                raise ValueError(f"r lists {listed} layers; the vision tower has {encoder_layers}")
            return removing(self.r)
        assert left is not None
        check_reachable(rules, tokens, class_token, left)
        for r in range(tokens):
            steps = removing(r)
            if rows_left(steps, tokens) <= left:
                return trim(steps, tokens, left)
        raise ValueError(
            f"keep={left - class_token} cannot be reached with inflect={self.inflect}: "
            f"{rows_left(steps, tokens) - class_token} is the smallest"
        )
