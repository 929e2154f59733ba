"""The ideal: the same model on as many tokens per layer as a method leaves, with no method work.

The model's own forward runs, all of it, so that Python and library code cost the same on both
sides; where the method made a sequence shorter, the ideal *slices* it (a sequence: no score, no
choice, no gather, no merge). The lengths are those the method's layers really worked on, read from
the tensors of one compressed forward. Which rows survive does not matter for time, so the last
ones do (text lies at the end); answers are meaningless.

So the ideal of a method that works after the encoder has the full encoder, the ideal of a method
inside the encoder runs the shorter encoder, and decode steps attend to as many cached tokens per
layer as under the method.

Why not replay recorded indices instead: that would run the engine's hooks, gathers and masks in the
ideal too and so hide what they cost. Why not a shorter prompt: methods that prune in the decoder
have a different length in every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import DynamicLayer

from tokprune.api import compress
from tokprune.bench.measure import new_cache, on_device
from tokprune.engine.cache import cache_argument
from tokprune.families import family_of
from tokprune.methods.base import Method


@dataclass(frozen=True)
class Lengths:
    """Rows per place of one prefill, padding included: what the modules really compute on.

    ``encoder``: (attention, MLP) rows of a tile per layer, class token included; ``projected``:
    rows of a tile through the projector; ``decoder``: tokens per decoder layer; ``cached``: KV
    entries per decoder layer after the prefill; ``original``: tokens of the prompt.
    """

    encoder: tuple[tuple[int, int], ...]
    projected: int
    decoder: tuple[int, ...]
    cached: tuple[int, ...]
    original: int


def observe(model: Any, inputs: Mapping[str, Any], method: Method | None = None) -> Lengths:
    """Lengths of one prefill under ``method`` (None: of the model as it is now).

    Reads shapes of tensors that pass by; changes nothing.
    """
    parts = family_of(model).parts(model)
    attended: dict[int, int] = {}
    mlp: dict[int, int] = {}
    decoder: dict[int, int] = {}
    projected: list[int] = []

    def note(to: dict[int, int], number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            to[number] = _hidden(args, kwargs).shape[1]

        return hook

    def projector(module: nn.Module, args: Any) -> None:
        projected.append(args[0].shape[1])

    with ExitStack() as stack, torch.inference_mode():
        if method is not None:
            stack.enter_context(compress(model, method))
        handles: list[RemovableHandle] = []
        stack.callback(_remove, handles)
        for number, layer in enumerate(parts.encoder_layers):
            for module, to in ((layer.self_attn, attended), (layer.mlp, mlp)):
                handles.append(module.register_forward_pre_hook(note(to, number), with_kwargs=True))
        handles.append(parts.projector.register_forward_pre_hook(projector))
        for number, layer in enumerate(parts.decoder_layers):
            handles.append(
                layer.self_attn.register_forward_pre_hook(note(decoder, number), with_kwargs=True)
            )
        cache = new_cache(model)
        batch = on_device(inputs, model.device)
        model(**batch, **{cache_argument(model): cache}, use_cache=True, logits_to_keep=1)
    return Lengths(
        encoder=tuple((attended[n], mlp[n]) for n in sorted(attended)),
        projected=projected[0],
        decoder=tuple(decoder[n] for n in sorted(decoder)),
        cached=tuple(layer.keys.shape[-2] for layer in cache.layers),
        original=batch["input_ids"].shape[1],
    )


@contextmanager
def shortened(model: Any, lengths: Lengths) -> Iterator[None]:
    """Inside the block the model works on sequences of these lengths, see the module.

    For prompts of ``lengths.original`` tokens on a new cache, and the decode steps after them.
    The hooks go when the block ends, however it ends.
    """
    ideal = _Ideal(model, lengths)
    try:
        ideal.install()
        yield
    finally:
        ideal.remove()


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()


def _hidden(args: Any, kwargs: dict[str, Any]) -> Tensor:
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


class _ShortLayer(DynamicLayer):
    """A cache layer that reports ``missing`` tokens more than it holds, so that the model's masks
    and ``generate`` go on counting in the original prompt."""

    def __init__(self, missing: int) -> None:
        super().__init__()
        self.missing = missing

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        held = super().get_seq_length()
        return held + self.missing if held else 0

    @property
    def held(self) -> int:
        return super().get_seq_length()


class _Ideal:
    def __init__(self, model: Any, lengths: Lengths) -> None:
        self.lengths = lengths
        family = family_of(model)
        self.parts = family.parts(model)
        self.rows = family.facts(model, self.parts).tokens_per_tile
        self.handles: list[RemovableHandle] = []
        self.cache_name = cache_argument(self.parts.language_model)
        self.cache: Any = None
        self.prefill = False
        #: the true sum after an MLP that ran on fewer rows than the attention before it
        self.residual: Tensor | None = None

    def install(self) -> None:
        parts, lengths = self.parts, self.lengths
        for number, layer in enumerate(parts.encoder_layers):
            rows, mlp = lengths.encoder[number]
            following = lengths.encoder[number + 1 :]
            after = following[0][0] if following else mlp
            if mlp < rows:
                self.handles += [
                    layer.layer_norm2.register_forward_pre_hook(self._between(mlp)),
                    layer.mlp.register_forward_hook(self._mlp),
                ]
            if after < rows:
                self.handles.append(layer.register_forward_hook(self._after(after), prepend=True))
        self.handles += [
            parts.projector.register_forward_pre_hook(self._features),
            parts.projector.register_forward_hook(self._projected),
            parts.language_model.register_forward_pre_hook(
                self._language_model_input, with_kwargs=True
            ),
            parts.language_model.register_forward_hook(self._done, with_kwargs=True),
        ]
        for number, layer in enumerate(parts.decoder_layers):
            if lengths.decoder[number] != lengths.original or self._is_short(number):
                self.handles.append(
                    layer.register_forward_pre_hook(self._layer(number), with_kwargs=True)
                )

    def remove(self) -> None:
        _remove(self.handles)
        self.cache = self.residual = None

    # ------------------------------------------------------------------ encoder

    def _between(self, rows: int) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> Any:
            self.residual = args[0][:, -rows:]
            return (self.residual,)

        return hook

    def _mlp(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        # the block adds its own, longer residual next: give it a row that broadcasts
        assert self.residual is not None
        self.residual = self.residual + output
        return output[:, :1]

    def _after(self, rows: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            if self.residual is not None:
                hidden, self.residual = self.residual, None
            hidden = hidden[:, -rows:]
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return hook

    def _features(self, module: nn.Module, args: tuple[Tensor, ...]) -> Any:
        # transformers 4.57 notes SigLIP's hidden states before any hook can shorten them
        return args[0][:, -self.lengths.projected :], *args[1:]

    def _projected(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        # the model packs full grids next; empty rows are cut off again at the decoder's input
        missing = self.rows - output.shape[1]
        if missing > 0:
            return F.pad(output, (0, 0, 0, missing))
        return output[:, : self.rows] if missing else None

    # ------------------------------------------------------------------ decoder

    def _is_short(self, number: int) -> bool:
        """Whether the cache layer holds less than the prompt."""
        return self.lengths.cached[number] != self.lengths.original

    def _language_model_input(self, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        embeds, cache = kwargs.get("inputs_embeds"), kwargs.get(self.cache_name)
        past = 0 if cache is None else cache.get_seq_length()
        self.prefill = embeds is not None and not past
        self.cache = cache
        if not self.prefill:
            return None
        assert embeds is not None
        lengths = self.lengths
        if embeds.shape[1] != lengths.original:
            raise ValueError(
                f"a prompt of {embeds.shape[1]} tokens; these lengths are for {lengths.original}"
            )
        if cache is not None:
            while len(cache.layers) < len(lengths.decoder):
                cache.layers.append(DynamicLayer())
            for number, held in enumerate(lengths.cached):
                if self._is_short(number):
                    cache.layers[number] = _ShortLayer(lengths.original - held)
        count = lengths.decoder[0]
        if count == lengths.original:
            return None
        kwargs["inputs_embeds"] = embeds[:, -count:]
        for name in ("position_ids", "attention_mask"):
            if kwargs.get(name) is not None:
                kwargs[name] = kwargs[name][..., -count:]
        if kwargs.get("cache_position") is not None:  # up to transformers 5.3
            kwargs["cache_position"] = kwargs["cache_position"][:count]
        return args, kwargs

    def _layer(self, number: int) -> Any:
        count = self.lengths.decoder[number]

        def hook(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            hidden = _hidden(args, kwargs)
            mask = kwargs.get("attention_mask")
            if self.prefill:
                if hidden.shape[1] != count:
                    hidden = hidden[:, -count:]
                pair = kwargs["position_embeddings"]
                if pair[0].shape[1] != count:
                    kwargs["position_embeddings"] = tuple(t[:, -count:] for t in pair)
                    for name in ("position_ids", "cache_position"):
                        if kwargs.get(name) is not None:
                            kwargs[name] = kwargs[name][..., -count:]
                    if mask is not None:
                        last = mask[..., -count:]
                        kwargs["attention_mask"] = (
                            last[..., -count:, :] if mask.dim() == 4 else last
                        )
            elif mask is not None and self.cache is not None:
                held = self.cache.layers[number]
                if isinstance(held, _ShortLayer):
                    kwargs["attention_mask"] = mask[..., -(held.held + hidden.shape[1]) :]
            if args:
                return (hidden, *args[1:]), kwargs
            kwargs["hidden_states"] = hidden
            return args, kwargs

        return hook

    def _done(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """After a prefill: cut the caches that the method cut at its end."""
        if not self.prefill or self.cache is None:
            return
        for number, held in enumerate(self.lengths.cached):
            layer = self.cache.layers[number]
            if layer.keys.shape[-2] != held:
                layer.keys, layer.values = layer.keys[..., -held:, :], layer.values[..., -held:, :]
