"""The search for register neurons, against a loop over images and layers."""

from __future__ import annotations

import pytest
import torch
from reference.registers import inner_tower
from tiny import llava, make_inputs

import tokprune

PROMPT = [[4, "image", 6]]


@torch.no_grad()
@pytest.mark.parametrize("threshold", [None, 6.0])
def test_search_equals_a_loop(threshold: float | None) -> None:
    model = llava()
    batches = [make_inputs(model, [[4, "image", 6]] * 2, seed=seed) for seed in (1, 2)]
    if threshold is None:  # with an outlier: one patch of each picture shines
        for batch in batches:
            batch["pixel_values"][:, :, :4, :4] *= 40
    layer, total, images = 3, torch.zeros(4, 48), 0
    for batch in batches:
        for pixels in batch["pixel_values"]:
            inner, seen, outputs = inner_tower(model), [], []
            handles = [
                block.mlp.fc2.register_forward_pre_hook(lambda m, a, seen=seen: seen.append(a[0]))
                for block in inner.encoder.layers[: layer + 1]
            ]
            handles.append(
                inner.encoder.layers[layer].register_forward_hook(
                    lambda m, a, out, outputs=outputs: outputs.append(
                        out[0] if isinstance(out, tuple) else out
                    )
                )
            )
            inner(pixels[None])
            for handle in handles:
                handle.remove()
            norm = outputs[0][0, 1:].norm(dim=-1)
            if threshold is None:
                q1, q3 = norm.quantile(0.25), norm.quantile(0.75)
                out = norm > q3 + 1.5 * (q3 - q1)
            else:
                out = norm > threshold
            if out.any():
                images += 1
                total += torch.stack([x[0, 1:][out].abs().mean(0) for x in seen])
    assert images
    want = total.flatten().sort(descending=True).indices[:6].tolist()
    found = tokprune.register_neurons(model, batches, top=6, layer=layer, threshold=threshold)
    assert found == tuple((n // 48, n % 48) for n in want)


def test_search_says_what_is_wrong() -> None:
    model = llava()
    batch = make_inputs(model, PROMPT)
    with pytest.raises(ValueError, match=r"threshold=1000000000\.0 finds no outlier"):
        tokprune.register_neurons(model, [batch], threshold=1e9)
    with pytest.raises(ValueError, match="top=0"):
        tokprune.register_neurons(model, [batch], top=0, threshold=0.0)
    with pytest.raises(ValueError, match="layer=5 should be from 0 to 4"):
        tokprune.register_neurons(model, [batch], layer=5)
    with pytest.raises(ValueError, match="list of model inputs"):
        tokprune.register_neurons(model, batch)  # type: ignore[arg-type]
    with (
        tokprune.compress(model, "occamtoken", prune_before=4),
        pytest.raises(ValueError, match="patched"),
    ):
        tokprune.register_neurons(model, [batch])
    assert not tokprune.is_patched(model)
