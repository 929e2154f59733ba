"""MSDG-Prune: patches that an encoder changes much, from groups changed in the same direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tokprune.engine.contracts import ImageTokens, ModelFacts, Plan
from tokprune.errors import CompositionError
from tokprune.methods.base import check_fits
from tokprune.methods.msdg.layers import Layers, Sink, check_layers, check_sink, encoder_layers
from tokprune.methods.msdg.states import QuestionStage, StatesStage
from tokprune.methods.options import AtLeast, Seed
from tokprune.methods.registry import register_method
from tokprune.methods.scoring import PromptSelector
from tokprune.operators.msdg import question_saliency, salient_of_groups


@register_method
@dataclass(frozen=True)
class MSDG(PromptSelector):
    """Patches are grouped by the direction in which the vision encoder changes them between an
    early and a late layer (spherical k-means). How far one moves in the middle layers, times its
    largest cosine to a word of the question behind the projector, is its saliency. A softmax of the
    groups' mean saliencies shares the budget, and the most salient patches of every group stay.

    Words are the embeddings of the prompt's text behind its images (of all its text where none
    follows; ours). All tiles or frames of an image are grouped together (ours), and newline tokens
    go. Where the model makes one token of several patches, their directions and changes are
    averaged, and one sink among them makes a sink of it. Needs the states of the encoder's blocks,
    and patches that no other method has dropped there.

    Args:
        keep: visual tokens per image (count), or fraction of its patches, sinks included.
        groups: of every image; at most one per token.
        layers: (early, late, start, end) of the encoder, counted from 0; states are those that
            enter these layers. None: as published, (2, 23, 14, 19) of 24 layers, and (2, 31, 19,
            24) of 32 where tokens are made of several patches; at the same share of the depth in
            other towers (ours).
        sink: (layer, coordinate, threshold): patches whose state behind that encoder layer exceeds
            the threshold there (absolute) are in no group, and stay only where too few others are
            left. It belongs to a checkpoint, and the paper leaves the layer open (so there are no
            presets): coordinate 650 behind layer 11 or 12 of CLIP ViT-L/14-336, 849 behind one of
            15 to 17 of Qwen2.5-VL's encoder, threshold 50. None: no patch is a sink.
        seed: the first centroid is patch number ``seed`` modulo the patches that are no sinks.
        positions: "compact" renumbers the shortened prompt (ours), "preserve" keeps the ids.

    Source: MSDG-Prune, "Representation Dynamics Reveal Semantic Saliency and Similarity …", 2026,
    arXiv 2609.36916. There is no official code.
    """

    name = "msdg"
    stages = ("encoder, five states", "after projector")
    needs = "states of five encoder layers, features, text embeddings"
    paper = "arXiv 2609.36916"
    source = "paper's equations"
    reads_prompt = True

    groups: Annotated[int, AtLeast(1)] = 20
    layers: Annotated[Layers, check_layers] | None = None
    sink: Annotated[Sink, check_sink] | None = None
    seed: Seed = 0

    @property
    def stochastic(self) -> bool:
        return False  # nothing is drawn

    def plan(self, facts: ModelFacts) -> Plan:
        check_fits(self.keep, facts)
        layers, packs = encoder_layers(self, facts)
        sink = None if self.sink is None else (self.sink[0], self.sink[1], self.sink[2])
        return Plan(encoder=(StatesStage(layers, sink, packs),), prompt=(QuestionStage(self),))

    def select(self, image: ImageTokens, keep: int) -> Tensor:
        return self.select_alike([image], keep)[0]

    def select_alike(self, images: Sequence[ImageTokens], keep: int) -> list[Tensor]:
        rows, device = [image.patch_rows() for image in images], images[0].features.device
        seen, texts = [], []
        for image, own in zip(images, rows):
            if image.metric is None:
                raise CompositionError(
                    "msdg compares states of the same patches in several encoder layers, and "
                    "another method has dropped or merged some there; leave one of them out"
                )
            assert image.text is not None
            seen.append(image.metric[own].to(device))
            texts.append(image.text.to(device))
        direction, change, mark = torch.stack(seen).tensor_split((-2, -1), dim=-1)
        query, lengths = pad_sequence(texts, True), torch.tensor([[len(text)] for text in texts])
        words = (torch.arange(query.shape[1]) < lengths).to(device, non_blocking=True)
        projected = torch.stack([image.features[own] for image, own in zip(images, rows)])
        saliency = question_saliency(change[..., 0], projected, query, words)
        sinks = mark[..., 0] > 0
        found = salient_of_groups(direction, saliency, keep, self.groups, sinks, self.seed)
        return [own[index] for own, index in zip(rows, found.kept)]
