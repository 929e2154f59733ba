"""The reference for decoders with linear attention, in which no key can be hidden.

What is promised there is the layer, run on the shorter sequence at the original positions. So the
unpruned model's own layers are run one after the other on the tokens that the trace says are left,
row by row, without padding and without a cache.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from tokprune.engine.contracts import Rectify
from tokprune.engine.positions import RotaryCall
from tokprune.families import bind
from tokprune.testing.generated import Entering, _Oracle, _View, forced_logits
from tokprune.trace import PrefillTrace


def is_hybrid(model: Any) -> bool:
    """Whether some decoder layers have no attention."""
    return any(not block.has_attention for block in bind(model).parts.decoder_layers)


@torch.no_grad()
def layer_by_layer(
    model: Any,
    inputs: dict[str, Tensor],
    trace: PrefillTrace,
    continuation: Tensor,
    seen: Entering | None = None,
    rectify: Rectify | None = None,
) -> Tensor:
    """What a compressed ``generate`` must give on such a model: logits [B, 1 + steps, V]; arguments
    as those of :func:`~tokprune.testing.generated.generated_oracle`."""
    parts = bind(model).parts
    hidden: list[Tensor] = []
    calls: list[RotaryCall] = []
    with ExitStack() as stack:

        def entering(module: Any, args: Any, kwargs: Any) -> None:
            hidden.append(args[0] if args else kwargs["hidden_states"])

        def rotary(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            calls.append(RotaryCall(module.forward, args, kwargs, output))

        first = parts.decoder_layers[0].module
        stack.callback(first.register_forward_pre_hook(entering, with_kwargs=True).remove)
        stack.callback(parts.rotary[0].register_forward_hook(rotary, with_kwargs=True).remove)
        forced_logits(model, inputs, continuation)
    batch, length = inputs["input_ids"].shape
    steps = len(hidden) - 1
    states = torch.cat(hidden, dim=1)
    ids = torch.cat([c.ids.expand(*c.ids.shape[:-2], batch, -1) for c in calls], dim=-1)
    checks = _Oracle(model, inputs, trace, seen, rectify)
    checks.native = ids[..., :length]
    views = [_View.of(layer, checks.segment, seen is not None) for layer in trace.layers]
    rows = []
    for b in range(batch):
        later = length + torch.arange(steps)
        now = torch.cat([views[0].columns[b], later])
        x = states[b : b + 1, now]
        for number, (block, layer) in enumerate(zip(parts.decoder_layers, trace.layers)):
            view = views[number]
            wanted = torch.cat([view.columns[b], later])
            place = now.tolist()
            x = x[:, [place.index(column) for column in wanted.tolist()]]
            now = wanted
            if seen is not None:
                own = seen.layers[number][b]
                x = torch.cat([own[len(own) - len(now) + steps :][None], x[:, -steps:]], dim=1)
            positions, shift = checks._expected(layer, view, b)
            own_ids = torch.cat([positions, ids[..., b, length:] - shift], dim=-1)
            table = calls[0].again(own_ids[..., None, :])
            mask = None
            if block.has_attention:
                seen_ = torch.ones(len(now), len(now), dtype=torch.bool).tril()
                prompt = len(now) - steps  # what left the cache is hidden from the steps alone
                seen_[prompt:, :prompt] &= torch.isin(view.columns[b], view.kept[b])
                blocked = torch.finfo(x.dtype).min
                mask = torch.zeros(1, 1, *seen_.shape).masked_fill(~seen_, blocked)
                if (terms := checks.terms) is not None:
                    mask[..., :prompt] += torch.tensor(terms.sizes(number, b)).log()
                    if terms.rectify.distance and terms.changed(number, b):
                        far = terms.distances(table, table)
                        if not terms.rectify.distance_in_decode:
                            far[:, prompt:] = 0
                        mask += far
                elif parts.language_model.config._attn_implementation == "sdpa":
                    mask = seen_[None, None]
            out = block.module(x, position_embeddings=table, attention_mask=mask)
            x = out[0] if isinstance(out, tuple) else out
        logits = model.get_output_embeddings()(parts.language_model.norm(x))
        rows.append(logits[0, len(now) - steps - 1 :])
    return torch.stack(rows)
