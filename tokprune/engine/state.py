"""What one forward of a patched model knows so far."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from torch import Tensor

from tokprune.engine.contracts import ImageTokens, Selection
from tokprune.engine.encoder import TowerPass
from tokprune.engine.images import ImageRecord
from tokprune.engine.labels import Alive
from tokprune.engine.layer_calls import LayerCalls
from tokprune.engine.model import ImageLayout, Tiles
from tokprune.engine.observed import ObservedPass
from tokprune.engine.prefill import PrefillPass
from tokprune.engine.prompt_layout import PromptLayout
from tokprune.engine.step import StepPass


@dataclass
class ForwardState:
    """Fresh for every forward; what is None is not known yet, or not part of it."""

    #: pass of the vision encoder that is running, and what the projector made of it [tiles, T, D]
    tower: TowerPass | None = None
    projected: Tensor | None = None
    #: the same of an encoder that stages only look at
    observed: ObservedPass | None = None
    #: images of these pixels
    pixels: tuple[Tensor, list[ImageLayout] | Tiles] | None = None
    #: whether videos are encoded now, which some models do by their encoder of images
    in_videos: bool = False
    #: those of the prompt, where it is known before they are encoded
    image_layouts: list[ImageLayout] | None = None
    #: where the images stand in the prompt
    layout: PromptLayout | None = None
    image_records: list[ImageRecord] | None = None
    #: the parts of every video that are compressed as one
    video_records: list[list[ImageRecord]] | None = None
    #: of every token of the conversation, [B, tokens]
    attention_mask: Tensor | None = None
    #: what the model makes for its layers, while they run
    calls: LayerCalls | None = None
    prefill: PrefillPass | None = None
    step: StepPass | None = None
    #: whether the embedded prompt is finite (0-dimensional bool)
    finite: Tensor | None = None
    #: what of every image enters the decoder, and the prompt stage's answer
    entered: list[ImageTokens] | None = None
    selections: list[Selection | None] | None = None

    @property
    def records(self) -> list[ImageRecord] | None:
        """Images, then parts of videos, as the prompt's layout numbers them."""
        if self.image_records is None and self.video_records is None:
            return None
        parts = [part for video in self.video_records or [] for part in video]
        return [*(self.image_records or []), *parts]

    @property
    def active(self) -> PrefillPass | StepPass | None:
        """What prepares the calls of the decoder's layers."""
        return self.prefill or self.step


class CurrentState(threading.local):
    """The state of the forward that runs in this thread."""

    def __init__(self) -> None:
        self.state = ForwardState()
        #: what is left of the prompt of the newest forward, None: all of it in its place
        self.alive: Alive | None = None
