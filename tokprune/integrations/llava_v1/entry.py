"""The way into a model of the original package: where it packs a prompt, and before its decoder."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokprune.engine.cache import cache_in
from tokprune.engine.compat import DynamicCache
from tokprune.engine.entry import Entry
from tokprune.engine.images import ImageRecord
from tokprune.engine.masks import backend_of
from tokprune.engine.prompt_layout import PromptLayout
from tokprune.engine.session import Session
from tokprune.errors import PromptMismatchError, UnsupportedModelError
from tokprune.integrations.llava_v1.attention import longer_tables
from tokprune.integrations.llava_v1.packing import pack

_ATTRIBUTE = "_tokprune_prompt"


@dataclass
class _Prompt:
    """What is known of a prepared prompt; travels as an attribute of its embeddings [B, L, D]."""

    session: Session
    layout: PromptLayout
    records: list[ImageRecord]
    shape: torch.Size


@dataclass
class _Generation:
    """One running ``generate``: it may repeat the embeddings (samples, beams), and attributes do
    not survive that, so the prompt waits here for the first call of the decoder."""

    text_only: bool
    prompt: _Prompt | None = None


class PrepareEntry(Entry):
    """In front of ``prepare_inputs_labels_for_multimodal`` and ``generate`` of one model."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self.model: Any = session.model
        self.thread = threading.local()
        self.wrapped = {self.model: ("prepare_inputs_labels_for_multimodal", "generate")}

    @property
    def generations(self) -> list[_Generation]:
        """The running calls of ``generate`` in this thread, innermost last."""
        stack: list[_Generation] = self.thread.__dict__.setdefault("generations", [])
        return stack

    def install(self) -> list[Any]:
        for name, stand_in in zip(self.wrapped[self.model], (self._prepare, self._generate)):
            self._wrap(name, stand_in)
        handles: list[Any] = [self.model.register_forward_hook(self.leave, always_call=True)]
        for block in self.parts.decoder_layers:
            handles.append(longer_tables(block.attention.rotary_emb, self._length))
        return handles

    def remove(self) -> None:
        for name in self.wrapped[self.model]:
            self.model.__dict__.pop(name, None)

    def _wrap(self, name: str, stand_in: Callable[..., Any]) -> None:
        """These are methods, no modules: an attribute of this one instance stands before them."""
        original = getattr(self.model, name)
        signature = inspect.signature(original)

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            return stand_in(functools.partial(original, *args, **kwargs), bound.arguments)

        self.model.__dict__[name] = wrapper

    def _length(self) -> int:
        active = self.session.state.active
        return 0 if active is None else active.total

    def _generate(self, original: Callable[[], Any], call: dict[str, Any]) -> Any:
        self.generations.append(_Generation(text_only=call.get("images") is None))
        try:
            return original()
        finally:
            self.generations.pop()
            self.session.new_state()

    def _prepare(self, original: Callable[[], Any], call: dict[str, Any]) -> Any:
        ids, images = call["input_ids"], call["images"]
        if images is None or ids.shape[1] == 1:  # text, or a step
            return original()
        facts = self.session.facts.tower
        assert facts is not None
        packed = pack(
            self.model, facts, ids, call["attention_mask"], images,
            call.get("image_sizes"),
        )  # fmt: skip
        state = self.session.state
        tower = state.tower = self.tower_pass(packed.layouts, images[0])
        try:
            result = original()
            tower.finish()
            records = self.session.image_records(
                packed.layouts, tower, state.projected, images[0].device
            )
        finally:
            state.tower = state.projected = None
        embeds = result[4]
        prompt = _Prompt(self.session, packed.prompt, records, embeds.shape)
        setattr(embeds, _ATTRIBUTE, prompt)
        if self.generations:
            self.generations[-1].prompt = prompt
        return (*result[:5], self.session.loss.take(result[5]))

    def language_model_input(self, kwargs: dict[str, Any]) -> None:
        state = self.session.new_state()
        cache, mask, embeds = cache_in(kwargs), kwargs.get("attention_mask"), None
        if kwargs.get("inputs_embeds") is not None:
            embeds = kwargs["inputs_embeds"]
            past = cache.get_seq_length() if isinstance(cache, DynamicCache) else 0
            self.admit(self._layout(embeds, mask, past), mask, cache)
        decoder = self.parts.language_model
        if decoder.gradient_checkpointing and decoder.training and state.layout is not None:
            raise UnsupportedModelError(
                "gradient checkpointing of transformers 4.37 computes layers twice, hooks and all; "
                "switch it off (model.gradient_checkpointing_disable()), or fine-tune the model in "
                "transformers' own classes"
            )
        wants_maps = kwargs.get("output_attentions")
        if wants_maps is None:
            wants_maps = self.parts.language_model.config.output_attentions
        if (
            wants_maps
            and backend_of(self.parts.language_model) == "sdpa"
            and (state.layout is not None or isinstance(cache, DynamicCache))
        ):
            raise ValueError(
                "output_attentions=True makes sdpa attention of transformers 4.37 fall back to "
                "eager masks; load the model with attn_implementation='eager'"
            )

    def _layout(self, embeds: Tensor, mask: Tensor | None, past: int) -> PromptLayout | None:
        prompt: _Prompt | None = getattr(embeds, _ATTRIBUTE, None)
        generation = self.generations[-1] if self.generations else None
        if generation is not None:
            prompt = prompt or generation.prompt
            generation.prompt = None
        if prompt is None:
            if generation is not None and generation.text_only:
                return None
            return self.layout_of_embeds(embeds, mask, past, "input_ids and images")
        if prompt.session is not self.session:
            raise ValueError(
                "inputs_embeds was prepared before the model was patched with this method; prepare "
                "it again"
            )
        batch, length, width = prompt.shape
        repeats = embeds.shape[0] // batch
        if tuple(embeds.shape) != (repeats * batch, length, width):
            raise PromptMismatchError(
                f"inputs_embeds has shape {tuple(embeds.shape)}; the prompt was prepared as "
                f"{tuple(prompt.shape)}"
            )
        self.check_mask(mask)
        if mask is not None and mask.shape[1] != past + length:
            raise PromptMismatchError(
                f"attention_mask has {mask.shape[1]} columns; it should have {past + length} "
                f"({past} cached and {length} new tokens)"
            )
        self.session.state.image_records = prompt.records
        return prompt.layout.repeated(repeats)
