"""Register neurons of a vision tower: those that answer where patches of outlying norm stand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokprune.api import compress, is_patched
from tokprune.calibration import without_steps
from tokprune.engine.contracts import EncoderRun, EncoderStage, Plan, TowerInput, TowerTokens
from tokprune.engine.model import ModelFacts
from tokprune.methods.base import Method
from tokprune.methods.options import check_range
from tokprune.methods.tiles import feature_layer
from tokprune.operators.occamtoken import outlier_activation
from tokprune.operators.outliers import outliers
from tokprune.operators.topk import rank


def register_neurons(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    *,
    top: int = 10,
    layer: int | None = None,
    threshold: float | None = None,
) -> tuple[tuple[int, int], ...]:
    """The neurons of a vision tower that make outliers of some patches, ``((layer, channel), …)``,
    the strongest first: what ``occamtoken`` takes as ``neurons``.

    Of every image (tile, frame) the patches whose norm behind encoder layer ``layer`` stands out
    are its outliers. A neuron, that is a channel of an MLP behind its activation function, has as
    score its mean magnitude at them, and then the mean over images; those without an outlier do not
    count. Layers behind ``layer`` cannot have made them and are left out. One prefill per batch; a
    batch should hold few images, as the activations of all its layers are held at once.

    Args:
        model: a supported model with a vision tower of the CLIP kind, not patched.
        batches: model inputs with images; some 50 to 100 images give a stable list.
        top: neurons wanted.
        layer: encoder layer, 0-based; None: the one that the model reads.
        threshold: norm above which a patch is an outlier (towers differ); None: above the upper
            fence of the box plot of its image's norms.

    Raises:
        UnsupportedModelError: no stage can work inside the model's tower.
        ValueError: the model is patched, an option does not fit, or no image has an outlier.

    Example::

        neurons = tokprune.register_neurons(model, batches)
        occamtoken = tokprune.calibrate(
            model, "occamtoken", batches, target=64, count="last", neurons=neurons
        )

    Source: Jiang et al., "Vision Transformers Don't Need Trained Registers", arXiv 2506.08010; that
    the threshold may come from the image itself is ours.
    """
    if threshold is not None:
        check_range(threshold, "threshold", 0, math.inf)
    if is_patched(model):
        raise ValueError("register_neurons: the model is patched; unpatch it first")
    if isinstance(batches, Mapping) or not (batches := list(batches)):
        raise ValueError(
            "batches should hold at least one batch with images: a list of model inputs"
        )
    search = _Search(layer=layer, threshold=threshold)
    with compress(model, search), torch.no_grad():
        for batch in batches:
            model(**without_steps(model, batch))
    found = search.found
    if found.score is None or not int(found.images):
        raise ValueError(
            f"threshold={threshold} finds no outlier among the patches of batches; it should be "
            "lower, or there should be more images"
        )
    layers, channels = found.score.shape
    if not 1 <= top <= layers * channels:
        raise ValueError(
            f"top={top} should be from 1 to {layers * channels}, the neurons of {layers} layers"
        )
    best = rank(found.score.flatten())[:top].tolist()
    return tuple(divmod(int(number), channels) for number in best)


@dataclass
class _Found:
    """Sum of the scores [layers, channels], and of how many images (on the tower's device)."""

    score: Tensor | None = None
    images: Tensor | int = 0


@dataclass(frozen=True)
class _Search(Method):
    """Looks at the tower and changes nothing."""

    name: ClassVar[str] = "register-neurons"
    layer: int | None = None
    threshold: float | None = None
    found: _Found = field(default_factory=_Found, repr=False, compare=False)

    def plan(self, facts: ModelFacts) -> Plan:
        read = feature_layer(facts.need_tower(self.name), self.name)
        last = read if self.layer is None else self.layer
        if not 0 <= last <= read:
            raise ValueError(
                f"layer={last} should be from 0 to {read}, the encoder layer that the model reads"
            )
        return Plan(encoder=(_SearchStage(self, last),))


class _SearchStage(EncoderStage):
    def __init__(self, search: _Search, last: int) -> None:
        self.search = search
        self.activation_layers = frozenset(range(last + 1))
        self.after_layers = frozenset({last})

    def start(self, tower: TowerInput) -> EncoderRun:
        return _SearchRun(self.search)


class _SearchRun(EncoderRun):
    def __init__(self, search: _Search) -> None:
        self.search = search
        self.activations: list[Tensor] = []

    def activation(self, layer: int, activations: Tensor, tokens: TowerTokens) -> None:
        self.activations.append(activations[:, tokens.first_patch :])

    def after(self, layer: int, hidden: Tensor, tokens: TowerTokens) -> None:
        norm = hidden[:, tokens.first_patch :].float().norm(dim=-1)
        threshold, found = self.search.threshold, self.search.found
        outlier = outliers(norm) if threshold is None else norm > threshold
        score = torch.stack(
            [outlier_activation(own, outlier.to(own.device)).sum(0).to(norm.device)
             for own in self.activations]
        )  # fmt: skip
        self.activations.clear()
        found.score = score if found.score is None else found.score + score
        found.images = found.images + outlier.any(1).sum()
