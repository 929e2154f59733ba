"""OccamToken: patches stay that are attended to more than a register token, in two stages."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from dataclasses import dataclass
from typing import Annotated, Any

from tokprune.engine.contracts import DecoderStage, Plan, Positions
from tokprune.engine.model import ModelFacts
from tokprune.methods.base import Knob, Method, check_fits, check_layers_fit
from tokprune.methods.depth import last_steps
from tokprune.methods.occamtoken.decoder import QuestionStage
from tokprune.methods.occamtoken.neurons import Neurons, check_neurons, read_neurons
from tokprune.methods.occamtoken.tower import RegisterStage
from tokprune.methods.options import AtLeast, Budget, Range
from tokprune.methods.registry import register_method
from tokprune.methods.tiles import feature_layer

#: decoder layer before which the published second stage drops
_LAYER = 11


@register_method
@dataclass(frozen=True)
class OccamToken(Method):
    """A register token runs through the vision encoder with the patches, and how much attention it
    gets is the level that every patch is measured by: how many stay follows image and question.

    Stage 1, at the layer that the model reads: a patch stays if the class token attends to it at
    least ``lambda1`` times as much as to the register (without a class token: all rows on the
    mean), by every tile or frame alone. The patches and the register, one a tile, go through the
    projector; registers enter the prompt behind the patches of their image, and newline tokens go.
    An image that loses nothing has room for its registers all the same: they are tokens beside its
    own. Stage 2, inside the decoder: a token stays if some token of the question attends to it at
    least ``lambda2`` times as much as the whole question, on the mean, to its image's registers. A
    prompt without text behind its images keeps what stage 1 left. Registers always stay, and count
    as tokens. Each stage costs one read by the host.

    The register is a row of zeros without a place of its own. It takes over what ``neurons`` do: at
    the patches these are silenced, and the register gets their largest value. Which neurons, a
    search finds once for every vision tower (:func:`tokprune.register_neurons`). Without them it
    is a token like many others, that draws little attention: published values of ``lambda1`` then
    drop next to nothing, and stage 2 measures by a level that says less.

    A budget is met on the mean over a data set, by :func:`tokprune.calibrate` with
    ``count="last"`` (published budgets are those after the second stage: 32 of LLaVA-1.5 are about
    107 on the mean over all layers); results are no comparison with fixed counts, image by image.
    As with every method that reads the question, later questions about an image see what the first
    one left. Works where stages can change the vision tower (CLIP and SigLIP of the LLaVA line); on
    videos whose frames the model pools behind it, and on other towers, it is refused.

    Args:
        lambda2: level of stage 2, in the register's attention; 0 leaves stage 2 out. No published
            value is known: to be calibrated.
        lambda1: the same of stage 1; 0 drops nothing there. Published: 0.01 to 0.02 for LLaVA-1.5,
            0.025 to 0.045 for LLaVA-NeXT.
        neurons: register neurons of the tower, ``((layer, channel), …)``, 0-based, or the path of a
            JSON file with a list of such pairs.
        keep: tokens of every image after stage 2, its registers among them (count), or fraction of
            those that stage 1 leaves: the registers and then the highest of the ranking, whatever
            ``lambda2`` is (the ablation with a fixed budget). None, as published: as many as reach
            the level.
        prune_before: decoder layer, 0-based, before which stage 2 drops, by the attention of the
            layer before. Published is "layer 11", here the 11th; 10 for Qwen.
        min_keep: patches of every tile, and without ``keep`` tokens of every image in stage 2,
            that stay in any case beside the register, those of the highest score (ours).
        positions: of stage 1: "compact" renumbers the shortened prompt, "preserve" keeps the
            original ids, where a register has that of its image's last token. Stage 2 keeps ids.

    Source: OccamToken, arXiv 2605.29657, of which no official code exists; registers at test time
    by Jiang et al., arXiv 2506.08010. Ours are: the layer of stage 1's attention, several
    registers, their place in the prompt, which text is the question (all behind the last image),
    positions.
    """

    name = "occamtoken"
    stages = ("encoder, feature layer", "decoder prefill")
    needs = "an extra token and MLP activations in the encoder, text attention of a decoder layer"
    paper = "arXiv 2605.29657"
    source = "paper's equations"
    reads_prompt = "stage 2"
    adaptive = "what reaches the register's attention; stage 2 without keep"
    without_class_token = "the mean attention that a token receives stands in for the class token's"
    knobs = ("lambda2", "lambda1", "keep")

    lambda2: Annotated[float, Range(0)] = 1.0
    lambda1: Annotated[float, Range(0)] = 0.015
    neurons: Annotated[Neurons | str, check_neurons] = ()
    keep: Budget | None = None
    prune_before: Annotated[int, AtLeast(1)] = _LAYER
    min_keep: Annotated[int, AtLeast(0)] = 0
    positions: Positions | None = None

    @classmethod
    def options_for_depth(cls, decoder_layers: int) -> dict[str, Any]:
        scaled = last_steps((_LAYER,), decoder_layers, ranked_before=True)
        return {name: steps[0] for name, steps in scaled.items()}

    def knob(self, name: str) -> Knob:
        """Either level, between next to nothing and far above the register; or ``keep``."""
        if name not in ("lambda2", "lambda1"):
            return super().knob(name)
        own = dataclasses.replace(self, keep=None) if name == "lambda2" else self

        def at(value: float) -> Method:
            return dataclasses.replace(own, **{name: value})  # type: ignore[arg-type]

        return Knob(at, (1e-4, 1e4), "registers and min_keep always stay")

    def plan(self, facts: ModelFacts) -> Plan:
        layer = feature_layer(facts.need_tower(self.name), "OccamToken")
        if self.keep is not None:
            check_fits(self.keep, facts)
        channels = defaultdict(list)
        for at, channel in read_neurons(self.neurons):
            if at > layer:
                raise ValueError(
                    f"neurons: ({at}, {channel}) should be in a layer from 0 to {layer}, the one "
                    "that the model reads"
                )
            channels[at].append(channel)
        decoder: tuple[DecoderStage, ...] = ()
        if self.lambda2 or self.keep is not None:
            check_layers_fit(self.prune_before, facts, first=1)
            decoder = (QuestionStage(self),)
        return Plan(encoder=(RegisterStage(self, layer, channels),), decoder=decoder)
