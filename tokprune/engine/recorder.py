"""What the engine tells of every prefill, to whoever keeps it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from tokprune.engine.contracts import ImageTokens, Plan, Selection
    from tokprune.engine.family import BoundModel
    from tokprune.engine.images import ImageRecord
    from tokprune.engine.prefill import PrefillPass
    from tokprune.engine.prompt_layout import PromptLayout


@dataclass(frozen=True)
class PrefillRecord:
    """One finished prefill with images, as the engine left it: tensors on the model's device.

    ``records``: the encoded images that ``layout`` numbers, None where the prompt came as
    embeddings; ``entered``, ``selections``: what of every image entered the decoder, in prompt
    order, and what the prompt stage answered for it.
    """

    bound: BoundModel
    plan: Plan
    prefill: PrefillPass
    layout: PromptLayout
    records: list[ImageRecord] | None
    entered: list[ImageTokens]
    selections: list[Selection | None]


class Recorder(Protocol):
    """Keeps what the engine tells. ``method``: the configuration at work, for error texts."""

    method: str

    def record_prefill(self, record: PrefillRecord) -> None: ...

    def record_step(self) -> None:
        """A forward without images on a compressed cache."""
