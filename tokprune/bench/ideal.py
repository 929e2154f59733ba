"""The ideal: the same model on as many tokens per layer as a method leaves, with no method work.

The model's own forward runs, all of it, so that Python and library code cost the same on both
sides; where the method made a sequence shorter, the ideal *slices* it (a sequence: no score, no
choice, no gather, no merge). The lengths are those the method's layers really worked on, read from
the tensors of one compressed forward. Which rows survive does not matter for time, so the last
ones do (text lies at the end); answers are meaningless.

So the ideal of a method that works after the encoder has the full encoder, as has every ideal where
no stage works inside it; the ideal of a method inside the encoder runs the shorter encoder, and
decode steps attend to as many cached tokens per layer as under the method.

Why not replay recorded indices instead: that would run the engine's hooks, gathers and masks in the
ideal too and so hide what they cost. Why not a shorter prompt: methods that prune in the decoder
have a different length in every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import DynamicLayer

from tokprune.api import compress
from tokprune.bench.measure import new_cache, on_device
from tokprune.engine.cache import cache_argument, cache_in
from tokprune.engine.model import Deep, Tower
from tokprune.families import bind, family_of
from tokprune.methods.base import Method


@dataclass(frozen=True)
class Lengths:
    """Rows per place of one prefill, padding included: what the modules really compute on.

    ``encoder``: (attention, MLP) rows of a tile per layer, class token included; ``projected``:
    rows of a tile through the projector (both empty where no stage works inside the encoder);
    ``decoder``: tokens per decoder layer; ``cached``: KV entries per cache layer after the prefill
    (0 without keys); ``original``: tokens of the prompt.
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
        watched = [(b.attention, decoder, n) for n, b in enumerate(parts.decoder_layers)]
        if parts.tower is not None:
            for number, layer in enumerate(parts.tower.layers):
                watched += [(layer.self_attn, attended, number), (layer.mlp, mlp, number)]
            handles.append(parts.tower.projector.register_forward_pre_hook(projector))
        for module, to, number in watched:
            handles.append(module.register_forward_pre_hook(note(to, number), with_kwargs=True))
        cache = new_cache(model)
        batch = on_device(inputs, model.device)
        model(**batch, **{cache_argument(model): cache}, use_cache=True, logits_to_keep=1)
    return Lengths(
        encoder=tuple((attended[n], mlp[n]) for n in sorted(attended)),
        projected=projected[0] if projected else 0,
        decoder=tuple(decoder[n] for n in sorted(decoder)),
        cached=tuple(_held(layer) for layer in cache.layers),
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


def _held(layer: Any) -> int:
    """Entries that a cache layer really holds."""
    keys = getattr(layer, "keys", None)
    return 0 if keys is None else int(keys.shape[-2])


def _last(table: Tensor | tuple[Tensor, ...] | None, count: int) -> Any:
    """The last rows of tables [..., L, d]."""
    if table is None or isinstance(table, Tensor):
        return table if table is None else table[..., -count:, :]
    return tuple(_last(part, count) for part in table)


class _ShortLayer(DynamicLayer):
    """A cache layer that reports ``missing`` tokens more than it holds, so that the model's masks
    and ``generate`` go on counting in the original prompt."""

    keys: Any
    values: Any

    def __init__(self, missing: int) -> None:
        super().__init__()
        self.missing = missing

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        held = super().get_seq_length()
        return held + self.missing if held else 0


class _Ideal:
    def __init__(self, model: Any, lengths: Lengths) -> None:
        self.lengths, self.bound = lengths, bind(model)
        self.handles: list[RemovableHandle] = []
        self.cache: Any = None
        self.prefill = False
        #: hooks of one prefill, for features that the model adds between its layers
        self.deep: list[RemovableHandle] = []
        #: the first layer on fewer tokens than the prompt has
        shorter = (n for n, count in enumerate(lengths.decoder) if count != lengths.original)
        self.first = next(shorter, len(lengths.decoder))
        #: the true sum after an MLP that ran on fewer rows than the attention before it
        self.residual: Tensor | None = None
        #: rows of a tile that the model expects of the projector, where it gets fewer
        self.rows: int | None = None

    def install(self) -> None:
        parts, lengths = self.bound.parts, self.lengths
        if parts.tower is not None:
            self._install_encoder(parts.tower)
        self.handles += [
            parts.language_model.register_forward_pre_hook(
                self._language_model_input, with_kwargs=True
            ),
            parts.language_model.register_forward_hook(self._done),
        ]
        for number, block in enumerate(parts.decoder_layers):
            if number >= self.first or lengths.cached[number : number + 1] != (lengths.original,):
                hook = self._layer(number)
                self.handles.append(block.module.register_forward_pre_hook(hook, with_kwargs=True))

    def _install_encoder(self, tower: Tower) -> None:
        shape = self.lengths.encoder
        self.cut = False  # whether rows go between or after layers
        facts = self.bound.facts.tower
        if facts is not None and shape and shape[0][0] > facts.patches + int(facts.has_cls):
            more = shape[0][0] - facts.patches - int(facts.has_cls)  # a stage adds some
            self.cut = True
            self.handles.append(
                tower.embeddings.register_forward_hook(
                    lambda module, args, output: F.pad(output, (0, 0, 0, more))
                )
            )
        for number, layer in enumerate(tower.layers):
            rows, mlp = shape[number]
            after = shape[number + 1][0] if number + 1 < len(shape) else mlp
            if mlp < rows:
                self.handles += [
                    layer.layer_norm2.register_forward_pre_hook(self._between(mlp)),
                    layer.mlp.register_forward_hook(self._mlp),
                ]
            if after < rows:
                self.cut = True
                self.handles.append(layer.register_forward_hook(self._after(after), prepend=True))
        self.handles += [
            tower.projector.register_forward_pre_hook(self._features),
            tower.projector.register_forward_hook(self._projected),
        ]

    def remove(self) -> None:
        _remove(self.handles)
        _remove(self.deep)
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
        facts, rows = self.bound.facts.tower, self.lengths.projected
        if not self.cut and args[0].shape[1] == rows:
            self.rows = None
            return None
        assert facts is not None
        self.rows = facts.tokens_per_tile
        # transformers 4.57 notes SigLIP's hidden states before any hook can shorten them
        return args[0][:, -rows:], *args[1:]

    def _projected(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        # the model packs full grids next; empty rows are cut off again in the decoder
        missing = 0 if self.rows is None else self.rows - output.shape[1]
        if missing > 0:
            return F.pad(output, (0, 0, 0, missing))
        return output[:, : self.rows] if missing else None

    # ------------------------------------------------------------------ decoder

    def _language_model_input(self, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The model makes masks and positions of the whole prompt; its layers get the last ones."""
        embeds, cache = kwargs.get("inputs_embeds"), cache_in(kwargs)
        past = 0 if cache is None else cache.get_seq_length()
        self.prefill = embeds is not None and not past
        self.cache = cache
        if embeds is None or not self.prefill:
            return None
        lengths = self.lengths
        if embeds.shape[1] != lengths.original:
            raise ValueError(
                f"a prompt of {embeds.shape[1]} tokens; these lengths are for {lengths.original}"
            )
        for deep in self.bound.family.deep(kwargs, self.first):
            module = self.bound.parts.decoder_layers[deep.layer].module
            self.deep.append(module.register_forward_hook(self._adds(deep)))
        if cache is not None:
            while len(cache.layers) < len(lengths.cached):
                cache.layers.append(DynamicLayer())
            for number, (layer, held) in enumerate(zip(cache.layers, lengths.cached)):
                if self._is_short(number, layer):
                    cache.layers[number] = _ShortLayer(lengths.original - held)
        return args, kwargs

    def _is_short(self, number: int, layer: Any) -> bool:
        """Whether the method makes a layer of the cache hold less than it would by itself."""
        own = self.lengths.original
        if not self.bound.parts.decoder_layers[number].has_attention:
            return False
        if self.lengths.decoder[number] == own and getattr(layer, "is_sliding", False):
            own = min(own, layer.sliding_window - 1)
        return self.lengths.cached[number] != own

    def _layer(self, number: int) -> Any:
        count = self.lengths.decoder[number]

        def hook(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            hidden, mask = _hidden(args, kwargs), kwargs.get("attention_mask")
            if self.prefill:
                if count != self.lengths.original:
                    self._shorten(kwargs, count)
                    args = (*args[:1], *(self._per_token(value, count) for value in args[1:]))
                hidden = hidden[:, -count:]
            elif mask is not None and self.cache is not None:
                held = dict(enumerate(self.cache.layers)).get(number)
                if isinstance(held, _ShortLayer):
                    keys = _held(held) + hidden.shape[1]
                    # masks of sliding windows may be narrower than what the method leaves
                    wide = F.pad(mask, (max(0, keys - mask.shape[-1]), 0))
                    kwargs["attention_mask"] = wide[..., -keys:]
            if args:
                return (hidden, *args[1:]), kwargs
            kwargs["hidden_states"] = hidden
            return args, kwargs

        return hook

    def _shorten(self, kwargs: dict[str, Any], count: int) -> None:
        """What a layer is given beside its hidden states, for the last tokens."""
        for name in kwargs:
            if name.startswith("position_embeddings"):
                kwargs[name] = _last(kwargs[name], count)
        for name in ("position_ids", "cache_position", "attention_mask"):
            if (value := kwargs.get(name)) is not None:
                queries = value[..., -count:, :] if value.dim() == 4 else value
                kwargs[name] = queries[..., -count:]

    def _per_token(self, value: Any, count: int) -> Any:
        if not isinstance(value, Tensor) or value.shape[1:2] != (self.lengths.original,):
            return value
        return value[:, -count:]

    def _adds(self, deep: Deep) -> Any:
        def hook(layer: nn.Module, args: Any, output: Any) -> Any:
            whole = isinstance(output, tuple)
            hidden = output[0] if whole else output
            last = replace(deep, row=deep.row[:, -hidden.shape[1] :])
            hidden = hidden + last.at(None).to(hidden)
            return (hidden, *output[1:]) if whole else hidden

        return hook

    def _done(self, module: Any, args: Any, output: Any) -> None:
        """After a prefill: cut the caches that the method cut at its end."""
        _remove(self.deep)
        if not self.prefill or self.cache is None:
            return
        for layer, held in zip(self.cache.layers, self.lengths.cached):
            if isinstance(layer, _ShortLayer) and _held(layer) != held:
                layer.keys, layer.values = layer.keys[..., -held:, :], layer.values[..., -held:, :]
