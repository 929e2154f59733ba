"""The masked oracle: the *unpruned* model, with dropped keys hidden layer by layer.

Dropping token j before layer l must equal running the unpruned model with j's key hidden from
every query at layers ≥ l. Masks and rotary positions per layer come from the trace of the
compressed run; everything else is the plain model on the full prompt. Encoder-stage pruning is
replayed the same way inside the vision tower; entries that left the KV cache after prefill are
hidden from the tokens after the prompt.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokprune.families import family_of
from tokprune.trace import LayerTrace, PrefillTrace

BLOCKED = torch.finfo(torch.float32).min


def _mask_decoder(
    model: Any, trace: PrefillTrace, length: int, steps: int, window: int | None
) -> list[Any]:
    """Hooks on the decoder layers of the unpruned model; ``length`` prompt + ``steps`` tokens."""
    parts = family_of(model).parts(model)
    total = length + steps
    first = trace.layers[0].column
    batch = first.shape[0]
    # rank: place of each original column in the order the decoder saw them
    rank = torch.full((batch, total), -1)
    for b in range(batch):
        seen = first[b][first[b] >= 0]
        assert len(set(seen.tolist())) == len(seen), "oracle needs one column per token"
        rank[b, seen] = torch.arange(len(seen))
        rank[b, length:] = len(seen) + torch.arange(steps)
    handles = []
    for number, layer in enumerate(parts.decoder_layers):
        seen = trace.layers[number]
        alive = torch.zeros(batch, total, dtype=torch.bool)
        position = torch.zeros(batch, total, dtype=torch.long)
        for b in range(batch):
            real = seen.column[b] >= 0
            columns = seen.column[b][real]
            alive[b, columns] = True
            position[b, columns] = seen.position[b][real]
            alive[b, length:] = True
            position[b, length:] = seen.position[b][real].max() + 1 + torch.arange(steps)
        visible = alive[:, None, :] & (rank[:, None, :] <= rank[:, :, None])
        for b in range(batch):
            kept = _left_in_cache(seen, b)
            if kept is not None:  # pruned after prefill: gone for the later tokens alone
                gone = torch.ones(length, dtype=torch.bool)
                gone[kept] = False
                visible[b, length:, :length] &= ~gone
                start = int(seen.next_position[b])
                assert start in (len(kept), int(position[b, length]))
                position[b, length:] = start + torch.arange(steps)
        if window is not None:
            visible &= position[:, :, None] - position[:, None, :] < window
        visible |= torch.eye(total, dtype=torch.bool)  # dropped rows: anything without NaN
        mask = torch.zeros(visible.shape).masked_fill(~visible, BLOCKED)[:, None]

        def hook(module: Any, args: Any, kwargs: Any, mask=mask, position=position) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            kwargs["attention_mask"] = mask
            kwargs["position_ids"] = position
            kwargs["position_embeddings"] = parts.rotary(hidden, position)
            return args, kwargs

        handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
    return handles


def _left_in_cache(seen: LayerTrace, row: int) -> Tensor | None:
    """Prompt columns that a layer's cache holds at the end of prefill, if not all it computed."""
    if seen.entries is None:
        return None
    kept = seen.entries[row][seen.entries[row] >= 0]
    column = seen.column[row][seen.column[row] >= 0]
    assert set(kept.tolist()) <= set(column.tolist())
    return kept if len(kept) < len(column) else None


def _mask_tower(model: Any, trace: PrefillTrace) -> list[Any]:
    """Hooks on the vision tower that hide the patches dropped in earlier layers."""
    parts = family_of(model).parts(model)
    records = []
    for image in trace.images:
        record = image.record
        if record is not None and record.history and all(record is not r for r in records):
            records.append(record)
    if not records:
        return []
    facts, handles = trace.facts, []
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
    for number, layer in enumerate(parts.encoder_layers):
        earlier = [n for n in alive if n < number]
        if not earlier:
            continue
        mask = torch.zeros(alive[max(earlier)].shape).masked_fill(~alive[max(earlier)], BLOCKED)

        passes = iter([True])  # pictures are encoded first, videos (not reduced) after them

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


def assert_same_logits(got: Tensor, want: Tensor) -> None:
    """Equal to 1e-5 of the largest logit (float32 rounding grows with the logits' scale)."""
    assert got.shape == want.shape
    error, scale = (got - want).abs().max().item(), want.abs().max().item()
    assert error <= 1e-5 * max(1.0, scale), f"logits differ by {error:.3g} (largest {scale:.3g})"


@torch.no_grad()
def oracle_logits(
    model: Any,
    inputs: dict[str, Tensor],
    trace: PrefillTrace,
    continuation: Tensor,
    window: int | None = None,
) -> Tensor:
    """Logits [B, 1 + steps, V] of the unpruned model at the last prompt token and at every
    token of ``continuation`` [B, steps]."""
    length, steps = inputs["input_ids"].shape[1], continuation.shape[1]
    ids = torch.cat([inputs["input_ids"], continuation], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(continuation)], dim=1)
    handles = _mask_tower(model, trace) + _mask_decoder(model, trace, length, steps, window)
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
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # as generate() numbers padded prompts
    out = model(**inputs, position_ids=positions, use_cache=True)
    rows = [out.logits[:, -1]]
    cache = out.past_key_values
    for step in range(continuation.shape[1]):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        position = mask.cumsum(1)[:, -1:] - 1
        out = model(
            input_ids=continuation[:, step : step + 1],
            attention_mask=mask,
            past_key_values=cache,
            position_ids=position,
            use_cache=True,
        )
        rows.append(out.logits[:, -1])
    return torch.stack(rows, dim=1)
