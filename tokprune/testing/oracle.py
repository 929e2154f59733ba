"""The masked oracle: the *unpruned* model, with dropped keys hidden layer by layer.

Dropping token j before layer l must equal running the unpruned model with j's key hidden from
every query at layers ≥ l. Masks and rotary positions per layer come from the trace of the
compressed run; everything else is the plain model on the full prompt. Encoder-stage pruning is
replayed the same way inside the vision tower; entries that left the KV cache after prefill are
hidden from the tokens after the prompt.

:mod:`tokprune.testing.generated` has the form for any family, and for merged tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tokprune.engine.cache import cache_argument
from tokprune.engine.images import ImageRecord
from tokprune.families import family_of
from tokprune.testing.numbering import later_positions, prompt_positions
from tokprune.testing.report import Fault, placed
from tokprune.trace import LayerTrace, PrefillTrace

BLOCKED = torch.finfo(torch.float32).min


def mask_decoder(
    model: Any, trace: PrefillTrace, length: int, steps: int, window: int | None = None,
    takes: dict[int, Callable[[Tensor], Tensor]] | None = None,
) -> list[Any]:  # fmt: skip
    """Hooks on the decoder layers of the unpruned model that hide what was dropped.

    Args:
        model: not patched.
        trace: of the compressed prefill; its columns are places in the sequence of this run.
        length: prompt tokens of this run.
        steps: tokens that follow the prompt.
        window: width of a sliding window in positions.
        takes: per layer, what becomes of the hidden states [B, L, D] that enter it.

    Returns:
        Handles; the caller removes them.

    Raises:
        Fault: the trace names a token twice in one layer, or cached tokens that the layer had not.
    """
    parts = family_of(model).parts(model)
    views = [_view(seen, number, length, steps, window) for number, seen in enumerate(trace.layers)]
    handles = []
    rotary = parts.rotary[0] if parts.rotary else None  # none in transformers 4.37
    layers = [block.module for block in parts.decoder_layers]
    for number, (layer, (mask, position)) in enumerate(zip(layers, views)):
        take = takes.get(number) if takes else None

        def hook(
            module: Any, args: Any, kwargs: Any, mask=mask, position=position, take=take
        ) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            if take is not None:
                hidden = take(hidden)
                if args:
                    args = (hidden, *args[1:])
                else:
                    kwargs["hidden_states"] = hidden
            kwargs["attention_mask"] = mask
            kwargs["position_ids"] = position
            if rotary is not None:
                kwargs["position_embeddings"] = rotary(hidden, position)
            return args, kwargs

        handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
    return handles


def _view(
    seen: LayerTrace, number: int, length: int, steps: int, window: int | None
) -> tuple[Tensor, Tensor]:
    """What a layer's queries see: additive mask [B, 1, L, L] and positions [B, L] of the prompt's
    ``length`` tokens and the ``steps`` after it."""
    total, batch = length + steps, seen.column.shape[0]
    # rank: place of each token in the order in which this layer saw them, −1 if dropped
    rank = torch.full((batch, total), -1)
    position = torch.zeros(batch, total, dtype=torch.long)
    for b in range(batch):
        real = seen.column[b] >= 0
        columns = seen.column[b][real]
        if len(set(columns.tolist())) != len(columns):
            raise Fault(
                f"decoder layer {number}, batch row {b}: two tokens stand at the same prompt "
                "column, so that the masked oracle cannot tell them apart"
            )
        rank[b, columns] = torch.arange(len(columns))
        rank[b, length:] = len(columns) + torch.arange(steps)
        position[b, columns] = seen.position[b][real]
        position[b, length:] = seen.position[b][real].max() + 1 + torch.arange(steps)
    visible = (rank[:, None, :] >= 0) & (rank[:, None, :] <= rank[:, :, None])
    for b in range(batch):
        if seen.entries is None:
            continue
        kept = _left_in_cache(seen, b, number)  # the rest is gone for the later tokens alone
        visible[b, length:, :length] &= torch.zeros(length, dtype=torch.bool).index_fill(0, kept, 1)
        start = position[b, length] if seen.next_position is None else seen.next_position[b]
        if int(start) not in (len(kept), int(position[b, length])):
            raise Fault(
                f"decoder layer {number}, batch row {b}: the token after the prompt has position "
                f"{int(start)}; it should be {len(kept)} (entries in the cache) or "
                f"{int(position[b, length])} (after the last of the prompt)"
            )
        position[b, length:] = start + torch.arange(steps)
    if window is not None:
        visible &= position[:, :, None] - position[:, None, :] < window
    visible |= torch.eye(total, dtype=torch.bool)  # dropped rows: anything without NaN
    return torch.zeros(visible.shape).masked_fill(~visible, BLOCKED)[:, None], position


def _left_in_cache(seen: LayerTrace, row: int, layer: int) -> Tensor:
    """Prompt columns that a layer's cache holds at the end of prefill."""
    assert seen.entries is not None
    kept = seen.entries[row][seen.entries[row] >= 0]
    if extra := set(kept.tolist()) - set(seen.column[row].tolist()):
        raise Fault(
            f"decoder layer {layer}, batch row {row}: its cache holds prompt columns "
            f"{sorted(extra)}, which the layer had not"
        )
    return kept


def mask_tower(model: Any, trace: PrefillTrace) -> list[Any]:
    """Hooks on the vision tower that hide the patches dropped in earlier layers; the caller removes
    them."""
    parts = family_of(model).parts(model)
    records = [record for record in trace.records if record.history]
    facts, handles = trace.facts.tower, []
    if not records or facts is None:  # packed encoders make tokens anew: what entered is taken over
        return []
    assert parts.tower is not None
    cls = int(facts.has_cls)
    alive: dict[int, Tensor] = {}
    for layer in {n for r in records for n, _ in r.history}:
        rows = []
        for record in records:
            slots = dict(record.history)[layer]
            for tile in slots:
                row = torch.zeros(facts.patches + cls, dtype=torch.bool)
                row[0 : cls or 0] = True
                row[tile[tile >= 0] + cls] = True
                rows.append(row)
        alive[layer] = torch.stack(rows)
    for number, layer in enumerate(parts.tower.layers):
        earlier = [n for n in alive if n < number]
        if not earlier:
            continue
        mask = torch.zeros(alive[max(earlier)].shape).masked_fill(~alive[max(earlier)], BLOCKED)

        passes = iter([True])  # images are encoded first, videos (not reduced) after them

        def hook(
            module: Any, args: Any, kwargs: Any, mask=mask[:, None, None, :], passes=passes
        ) -> Any:
            if not next(passes, False):
                return None
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            square = mask.expand(-1, 1, hidden.shape[1], -1)
            kwargs["attention_mask"] = square
            return args, kwargs

        handles.append(layer.self_attn.register_forward_pre_hook(hook, with_kwargs=True))
    return handles


def continuation_tokens(batch: int, steps: int) -> Tensor:
    """Fixed random tokens [batch, steps] to feed after a prompt."""
    return torch.randint(3, 98, (batch, steps), generator=torch.Generator().manual_seed(17))


def assert_same_logits(
    got: Tensor, want: Tensor, what: str = "logits", hint: str = "", tolerance: float = 1e-5
) -> None:
    """Equal to 1e-5 of the largest logit (float32 rounding grows with the logits' scale).

    ``what`` and ``hint`` are the words before and after the numbers.

    Raises:
        Fault: an AssertionError that says how far they are apart and where the most.
    """
    if got.shape != want.shape:
        raise Fault(f"{what} have shape {list(got.shape)} instead of {list(want.shape)}")
    error, scale = (got - want).abs(), want.abs().max().item()
    if not error.max().item() <= tolerance * max(1.0, scale):
        raise Fault(
            f"{what} differ by {error.max().item():.3g} (largest logit {scale:.3g}, allowed "
            f"{tolerance * max(1.0, scale):.1g}){placed(error)}{hint}"
        )


@torch.no_grad()
def oracle_logits(
    model: Any,
    inputs: dict[str, Tensor],
    trace: PrefillTrace,
    continuation: Tensor,
    window: int | None = None,
) -> Tensor:
    """Logits [B, 1 + steps, V] of the unpruned model at the last prompt token and at every
    token of ``continuation`` [B, steps]; ``window``: width of its sliding window.

    Right for methods that only drop tokens (:func:`merges` is False).
    """
    length, steps = inputs["input_ids"].shape[1], continuation.shape[1]
    ids = torch.cat([inputs["input_ids"], continuation], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(continuation)], dim=1)
    handles = mask_tower(model, trace) + mask_decoder(model, trace, length, steps, window)
    try:
        logits = model(
            **{**inputs, "input_ids": ids, "attention_mask": mask}, use_cache=False
        ).logits
    finally:
        for handle in handles:
            handle.remove()
    last = [int(row.nonzero().max()) for row in inputs["attention_mask"]]
    first = torch.stack([logits[b, at] for b, at in enumerate(last)])
    return torch.cat([first[:, None], logits[:, length:]], dim=1)


@torch.no_grad()
def compressed_logits(model: Any, inputs: dict[str, Tensor], continuation: Tensor) -> Tensor:
    """The same logits from a patched model: one prefill, then cached steps fed with
    ``continuation``."""
    mask = inputs["attention_mask"]
    out = model(**inputs, **prompt_positions(model, inputs), use_cache=True)
    rows = [out.logits[:, -1]]
    cache = out.past_key_values
    for step in range(continuation.shape[1]):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        out = model(
            input_ids=continuation[:, step : step + 1],
            attention_mask=mask,
            **later_positions(model, mask, 1),
            use_cache=True,
            **{cache_argument(model): cache},
        )
        rows.append(out.logits[:, -1])
    return torch.stack(rows, dim=1)


# ------------------------------------------------------------------------------- merges


def merges(trace: PrefillTrace) -> bool:
    """Whether some token that the last decoder layer saw stands for several, or for none that the
    prompt has a place for (a class token, padding): then the masked oracle does not apply."""
    groups = [
        image.selection.group[None]
        for image in trace.images
        if image.selection is not None and image.selection.group is not None
    ]
    if any(record.history and record.facts is None for record in trace.records):
        return True  # a token of a packed encoder is made of whatever patches are left
    if any(_without_place(record) for record in trace.records):
        return True
    groups += [record.group for record in trace.records if record.group is not None]
    groups += [drop.group for drop in trace.drops if drop.group is not None]
    return any((row[row >= 0].bincount() > 1).any() for group in groups for row in group)


def _without_place(record: ImageRecord) -> bool:
    """Whether a vision encoder's survivors include some that the prompt has no place for."""
    if record.cell is None:
        return False
    return bool(
        (
            record.places(record.cell, torch.arange(record.count, device=record.cell.device)) < 0
        ).any()
    )


def _held(layer: LayerTrace, row: int) -> Tensor:
    """Which tokens of a layer [L] bool have a column that its cache holds after the prefill."""
    assert layer.entries is not None
    column, kept = layer.column[row], layer.entries[row]
    return torch.isin(column, kept[kept >= 0]) & (column >= 0)


def steps_are_known(trace: PrefillTrace) -> bool:
    """Whether the trace tells which tokens each cache holds: not where a merge leaves several
    tokens at one prompt column and the cache some of them."""
    return all(
        int(_held(layer, row).sum()) == int((layer.entries[row] >= 0).sum())
        for layer in trace.layers
        if layer.entries is not None
        for row in range(len(layer.lengths))
    )
