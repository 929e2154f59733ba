"""Decoder methods that score in layer K−1 and drop before layer K, once."""

from __future__ import annotations

from collections.abc import Callable

from tokprune.engine.contracts import DecoderRun, DecoderStage, ModelFacts


def check_cut(layer: int, facts: ModelFacts) -> None:
    """Whether the model has a layer K.

    Raises:
        ValueError: it has not; names the number of its layers.
    """
    if layer >= facts.decoder_layers:
        raise ValueError(f"layer={layer} should be below the model's {facts.decoder_layers} layers")


class OneCut(DecoderStage):
    """Taps the attention of layer K−1 and lets each prefill's ``run()`` drop before layer K."""

    def __init__(self, layer: int, run: Callable[[], DecoderRun]) -> None:
        self.run = run
        self.taps = frozenset({layer - 1})
        self.prune_layers = frozenset({layer})

    def start(self) -> DecoderRun:
        return self.run()
