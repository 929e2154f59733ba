"""What a decoder layer is called with: what the model made for it, at the tokens that are left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokprune.engine import masks
from tokprune.engine.masks import backend_of, check_backend
from tokprune.engine.model import Block
from tokprune.engine.once import Once
from tokprune.engine.positions import RotaryCall, at, first, ids_at, made_by
from tokprune.errors import UnsupportedModelError


@dataclass(eq=False)
class View:
    """The queries and keys of a layer, in columns of the conversation.

    ``queries`` [B, n], ``keys`` [B, m]: −1 = padding; ``total``: tokens of the conversation;
    ``padded``: whether a key is padding (host); ``places``: of queries and keys, where sliding
    windows count them; None: at their columns. ``gaps``: whether positions have any (host).
    """

    queries: Tensor
    keys: Tensor
    total: int
    padded: bool
    places: tuple[Tensor, Tensor] | None = None
    gaps: bool = False


class LayerCalls:
    """The arguments of the layers of one forward."""

    def __init__(
        self, language_model: Any, attention_mask: Any, real: Tensor | None, legacy: bool = False
    ) -> None:
        self.language_model = language_model
        #: as the language model was given it: [B, tokens], a dict of masks by layer type, or None
        self.attention_mask = attention_mask
        #: tokens of the conversation that are no padding, [B, tokens]; None: all
        self.real = real
        #: layers of transformers 4.37, whose masks have full shape
        self.legacy = legacy
        #: calls of the language model's rotary modules in this forward
        self.rotary: list[RotaryCall] = []
        self.once = Once()
        #: the attention backend of this forward
        self.backend = check_backend(backend_of(language_model), "language model")

    def final_norm(self, hidden: Tensor) -> Tensor:
        model = self.language_model
        norm = model.norm if hasattr(model, "norm") else model.final_layernorm  # of Phi
        normed: Tensor = norm(hidden)
        return normed

    # ------------------------------------------------------------------ masks

    def mask(self, mask: Tensor | None, view: View, block: Block, hidden: Tensor) -> Tensor | None:
        """The model's mask of a layer, at the view's queries and keys."""
        made: Tensor | None = self.once(
            "mask", lambda: self._mask(mask, view, block.window, hidden), mask, view,
            block.window or 0,
        )  # fmt: skip
        return made if made is None or made.device == hidden.device else made.to(hidden.device)

    def _mask(
        self, mask: Tensor | None, view: View, window: int | None, hidden: Tensor
    ) -> Tensor | None:
        if self.backend.startswith("flash") and window is not None and view.total > window:
            if view.gaps:
                raise UnsupportedModelError(
                    "flash attention counts the tokens that are left in a sliding window, and "
                    "with positions='preserve' it should count those that went as well; load the "
                    "model with attn_implementation='sdpa' or config.sliding_window=None, or use "
                    "positions='compact'"
                )
            window = None
        if mask is None:
            if not view.padded:
                return None
            made = masks.causal(self.backend, view.queries, view.keys, hidden.dtype)
        else:
            made = masks.at(mask, view.queries, view.keys, view.total)
            slides = window is not None and view.total > window
            if slides and made.dim() == 4 and view.places is not None:
                assert window is not None
                made = self._windowed(made, view, window, hidden.dtype)
        if self.legacy and made.dim() == 4:
            made = made.expand(len(view.queries), -1, -1, -1)
        return made

    def _windowed(self, made: Tensor, view: View, window: int, dtype: torch.dtype) -> Tensor:
        """The window counted where positions were closed up: of what a full layer would see, the
        near; and what the model's own mask shows beyond its window."""
        assert view.places is not None
        query, key = view.places
        # compared, not subtracted: no map of numbers is made
        near = key[:, None, :] > query[:, :, None] - window
        far = view.keys[:, None, :] <= view.queries[:, :, None] - window
        whole = self.attention_mask
        if isinstance(whole, dict):
            whole = whole.get("full_attention")
        if whole is None or whole.dim() != 4:
            seen = view.queries[:, :, None] >= view.keys[:, None, :]
            seen = seen & self._valid(view)[:, None, :]
            base = masks.in_form(self.backend, seen[:, None], dtype)
        else:
            base = masks.at(whole, view.queries, view.keys, view.total)
        return masks.moved_window(made, base, near, far)

    def _valid(self, view: View) -> Tensor:
        """[B, m] bool: keys that are no padding."""
        valid = view.keys >= 0
        if self.real is None:
            return valid
        real = masks.at(self.real != 0, view.queries, view.keys, view.total)
        return valid & real.to(valid.device)

    # ------------------------------------------------------------------ positions

    def rotary_position(self, kwargs: dict[str, Any], hidden: Tensor) -> Tensor:
        """Rotary positions [B, L] or [3, B, L] of the tokens of this forward, as the model has
        them."""
        if self.rotary:
            ids = self.rotary[0].ids
        elif kwargs.get("position_ids") is not None:
            ids = kwargs["position_ids"]
        else:
            raise UnsupportedModelError(
                f"{type(self.language_model).__name__} hands its layers no positions that could be "
                "followed"
            )
        return ids.to(hidden.device).expand(*ids.shape[:-2], hidden.shape[0], -1)

    def place(
        self, kwargs: dict[str, Any], block: Block, view: View | None, column: Tensor,
        position: Tensor | None,
    ) -> None:  # fmt: skip
        """Hand a layer the positions and tables of the tokens at ``column`` [B, n] of this
        forward's; ``position`` [B, n] or [3, B, n]: new ones (None: their own)."""
        for name, table in kwargs.items():
            if name.startswith("position_embeddings") and table is not None:
                kwargs[name] = self._table(table, column, position)
        ids = kwargs.get("position_ids")
        if ids is None:
            return
        kwargs["position_ids"] = self.once(
            "ids",
            lambda: position if position is not None and position.dim() == 2
            else ids_at(ids, column),
            ids, column, position,
        )  # fmt: skip
        if view is not None and view.gaps and self.backend.startswith("flash") and not self.legacy:
            # Gaps in the positions of a single row without mask are taken for packed sequences.
            if not block.reads_positions:
                kwargs["position_ids"] = None
            elif kwargs.get("attention_mask") is None:
                kwargs["attention_mask"] = view.keys >= 0

    def _table(self, table: Any, column: Tensor, position: Tensor | None) -> Any:
        def make() -> Any:
            if position is not None:
                return made_by(self.rotary, table).again(position)
            if isinstance(table, Tensor):
                return at(table, column)
            return tuple(at(part, column) for part in table)

        return self.once("table", make, first(table), column, position)
