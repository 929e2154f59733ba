"""CenterCLIP on its own: reduced frame features from any CLIP vision model of transformers."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from reference.clustering import kmedoids_by_hand
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import tokprune
from tokprune.operators import Clusterer

LAYERS, SIDE, WIDTH = 5, 4, 16
VISION: dict[str, Any] = {
    "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": LAYERS,
    "num_attention_heads": 2, "image_size": 16, "patch_size": 4, "projection_dim": 12,
}  # fmt: skip


def noisy(model: Any) -> Any:
    """Random weights that are not so small that every token looks alike."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model.eval()


def config(attention: str = "sdpa") -> CLIPVisionConfig:
    made = CLIPVisionConfig(**VISION)
    made._attn_implementation = attention
    return made


def whole_clip() -> Any:
    text = CLIPTextConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        vocab_size=10, projection_dim=12,
    )  # fmt: skip
    return noisy(
        CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=VISION, projection_dim=12))
    )


BUILD: dict[str, Any] = {
    "CLIPVisionModel": lambda: noisy(CLIPVisionModel(config())),
    "CLIPVisionModelWithProjection": lambda: noisy(CLIPVisionModelWithProjection(config())),
    "CLIPModel": whole_clip,
    "CLIPModel.vision_model": lambda: whole_clip().vision_model,
    "eager": lambda: noisy(CLIPVisionModel(config("eager"))),
}


def pixels(batch: int = 2, frames: int = 6, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, frames, 3, 16, 16, generator=generator)


def hooks(model: nn.Module) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


def by_hand(
    model: Any, video: Tensor, segments: int, keep: int, layer: int, mean: bool = False
) -> tuple[Tensor, Tensor]:
    """One video [T, 3, H, W]: layers called one after the other, clustering by loops."""
    tower = getattr(model, "vision_model", model)
    x = tower.pre_layrnorm(tower.embeddings(video))
    for block in tower.encoder.layers[:layer]:
        x = _block(block, x)
    each = len(video) // segments
    rows = []
    for s in range(segments):
        own = x[s * each : (s + 1) * each if s < segments - 1 else len(video)]
        tokens = own[:, 1:].flatten(0, 1)
        medoids, clusters = kmedoids_by_hand(tokens, keep)
        kept = [tokens[c].mean(0) if mean else tokens[m] for m, c in zip(medoids, clusters)]
        rows.append(torch.stack([own[:, 0].mean(0), *kept]))
    x = torch.stack(rows)
    for block in tower.encoder.layers[layer:]:
        x = _block(block, x)
    return x, tower.post_layernorm(x[:, 0])


def _block(block: Any, x: Tensor) -> Tensor:
    """A CLIP block, written out: attention over all tokens, then the MLP."""
    attention, normed = block.self_attn, block.layer_norm1(x)
    heads = attention.num_heads
    q, k, v = (
        module(normed).unflatten(-1, (heads, -1)).transpose(1, 2)
        for module in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    weight = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    x = x + attention.out_proj((weight @ v).transpose(1, 2).flatten(2))
    return x + block.mlp(block.layer_norm2(x))


@pytest.mark.parametrize("kind", BUILD)
@pytest.mark.parametrize(
    ("segments", "keep", "layer", "mean", "frames"),
    [(2, 16, None, False, 6), (3, 7, 1, False, 6), (1, 20, 4, True, 6), (3, 9, 2, True, 7)],
)
@torch.no_grad()
def test_equals_the_layers_called_one_by_one(
    kind: str, segments: int, keep: int, layer: int | None, mean: bool, frames: int
) -> None:
    model, video = BUILD[kind](), pixels(frames=frames)
    got = tokprune.reduce_frames(
        model, video, segments=segments, keep=keep, layer=layer, aggregate="mean" if mean else None
    )
    assert got.last_hidden_state.shape == (2, segments, 1 + keep, WIDTH)
    projection = getattr(model, "visual_projection", None)
    for b in range(2):
        at = 3 if layer is None else layer  # ⌈5/2⌉
        hidden, classes = by_hand(model, video[b], segments, keep, at, mean)
        torch.testing.assert_close(got.last_hidden_state[b], hidden, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got.class_features[b], classes, rtol=1e-4, atol=1e-5)
        if projection is None:
            assert got.embeds is None
        else:
            assert got.embeds is not None
            torch.testing.assert_close(got.embeds[b], projection(classes), rtol=1e-4, atol=1e-4)
    assert hooks(model) == 0


@torch.no_grad()
def test_keeping_every_frame_whole_is_the_model_itself() -> None:
    model, video = BUILD["CLIPVisionModelWithProjection"](), pixels()
    got = tokprune.reduce_frames(model, video, segments=6, keep=SIDE**2)
    want = model(video.flatten(0, 1))
    assert torch.equal(got.last_hidden_state.flatten(0, 1), want.last_hidden_state)
    assert got.embeds is not None
    assert torch.equal(got.embeds.flatten(0, 1), want.image_embeds)


@torch.no_grad()
def test_several_layers() -> None:
    """6 frames → 3 segments of 10 → 1 of 12, each from what the one before left."""
    model, video = BUILD["CLIPVisionModel"](), pixels()
    got = tokprune.reduce_frames(model, video, segments=[3, 1], keep=[10, 12], layer=[1, 3])
    assert got.last_hidden_state.shape == (2, 1, 13, WIDTH)
    (first, one), (second, two) = got.reductions
    assert (first, second) == (1, 3)
    assert one.hidden.shape[1:3] == (3, 11)
    x = one.hidden.flatten(0, 1)
    tower = getattr(model, "vision_model", model)
    for block in tower.encoder.layers[1:3]:
        x = _block(block, x)
    for b, own in enumerate(x.unflatten(0, (2, 3))):
        tokens = own[:, 1:].flatten(0, 1)
        assert two.medoids is not None
        assert two.medoids[b, 0].tolist() == kmedoids_by_hand(tokens, 12)[0]


@torch.no_grad()
def test_videos_of_a_batch_do_not_mix() -> None:
    model, video = BUILD["CLIPVisionModel"](), pixels(3)
    together = tokprune.reduce_frames(model, video, segments=2, keep=9).last_hidden_state
    for b in range(3):
        one = tokprune.reduce_frames(model, video[b : b + 1], segments=2, keep=9)
        torch.testing.assert_close(one.last_hidden_state[0], together[b], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("algorithm", ["spectral", "sparse_sampling", "pooling"])
@torch.no_grad()
def test_other_algorithms(algorithm: Any) -> None:
    model, video = BUILD["CLIPVisionModelWithProjection"](), pixels()
    keep = SIDE**2 if algorithm == "pooling" else 5
    window = (3, 3) if algorithm == "spectral" else None
    got = tokprune.reduce_frames(
        model, video, segments=3, keep=keep, clusterer=Clusterer(algorithm, window=window)
    )
    assert got.last_hidden_state.shape == (2, 3, 1 + keep, WIDTH)
    kmedoids = tokprune.reduce_frames(model, video, segments=3, keep=keep)
    assert not torch.equal(got.last_hidden_state, kmedoids.last_hidden_state)


@torch.no_grad()
def test_pooled_is_the_mean_of_real_segments() -> None:
    model, video = BUILD["CLIPVisionModelWithProjection"](), pixels()
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 3:] = False  # ends inside the second of three segments
    got = tokprune.reduce_frames(model, video, segments=3, keep=8, frame_mask=mask)
    assert got.mask.tolist() == [[True] * 3, [True, False, False]]
    assert got.embeds is not None
    want = torch.stack([got.embeds[0].mean(0), got.embeds[1, 0]])
    torch.testing.assert_close(got.pooled(), want)
    unit = got.pooled(normalize=True)
    torch.testing.assert_close(unit.norm(dim=-1), torch.ones(2))
    each = got.embeds[0] / got.embeds[0].norm(dim=-1, keepdim=True)
    torch.testing.assert_close(unit[0], each.mean(0) / each.mean(0).norm())
    empty = tokprune.reduce_frames(
        model, video, segments=3, keep=8, frame_mask=torch.zeros(2, 6, dtype=torch.bool)
    )
    assert (empty.pooled() == 0).all()


@torch.no_grad()
def test_pooled_without_a_projection_uses_class_features() -> None:
    got = tokprune.reduce_frames(BUILD["CLIPVisionModel"](), pixels(), segments=2, keep=8)
    torch.testing.assert_close(got.pooled(), got.class_features.mean(1))


def test_gradients_reach_the_weights() -> None:
    model = BUILD["CLIPVisionModelWithProjection"]()
    tokprune.reduce_frames(model, pixels(), segments=2, keep=6).pooled().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@torch.no_grad()
def test_half_precision_stays_half() -> None:
    model = BUILD["CLIPVisionModelWithProjection"]().to(torch.bfloat16)
    got = tokprune.reduce_frames(model, pixels().to(torch.bfloat16), segments=2, keep=6)
    assert got.embeds is not None
    assert got.embeds.dtype == got.last_hidden_state.dtype == torch.bfloat16
    assert got.pooled().dtype == torch.bfloat16


@torch.no_grad()
def test_reads_no_values() -> None:
    """On the meta device every look at a value raises."""
    model = BUILD["CLIPVisionModelWithProjection"]().to("meta")
    for aggregate in (None, "mean"):
        got = tokprune.reduce_frames(
            model, pixels(frames=7).to("meta"), segments=2, keep=6, aggregate=aggregate
        )
        assert got.pooled().shape == (2, 12)


@torch.no_grad()
def test_the_model_is_left_alone_even_on_failure() -> None:
    model, video = BUILD["CLIPVisionModel"](), pixels()
    before = model(video.flatten(0, 1)).last_hidden_state

    def fail(*_: Any) -> None:
        raise RuntimeError("stop here")

    last = getattr(model, "vision_model", model).encoder.layers[-1]
    handle = last.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop here"):
        tokprune.reduce_frames(model, video, segments=2, keep=6)
    handle.remove()
    assert hooks(model) == 0
    assert torch.equal(model(video.flatten(0, 1)).last_hidden_state, before)


@torch.no_grad()
def test_other_threads_see_the_model_as_it_is() -> None:
    model, video = BUILD["CLIPVisionModel"](), pixels()
    want = model(video.flatten(0, 1)).last_hidden_state
    seen: list[Tensor] = []

    def elsewhere(*_: Any) -> None:
        if threading.current_thread() is not threading.main_thread() or seen:
            return

        def work() -> None:
            with torch.no_grad():
                seen.append(model(video.flatten(0, 1)).last_hidden_state)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    first = getattr(model, "vision_model", model).encoder.layers[0]
    handle = first.register_forward_pre_hook(elsewhere)
    tokprune.reduce_frames(model, video, segments=2, keep=6)
    handle.remove()
    assert torch.equal(seen[0], want)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"segments": 7}, "segments=7 should be between 1 and the 6 frames"),
        ({"segments": 0}, "segments=0"),
        ({"keep": 49}, "keep=49 should be between 1 and the 48 tokens of a segment of 3 frames"),
        ({"keep": 0}, "keep=0"),
        ({"layer": 5}, "layer=5 should rise and lie between 0 and 4"),
        ({"layer": [1, 3]}, r"layer=\[1, 3\], segments=2 and keep=6 should be single numbers"),
        ({"layer": [3, 1], "segments": [3, 1], "keep": [4, 4]}, r"layer=\[3, 1\] should rise"),
        ({"layer": [1, 3], "segments": [2, 3], "keep": [4, 4]}, r"segments=\[2, 3\]"),
        ({"layer": [], "segments": [], "keep": []}, "lists of one length"),
        ({"frame_mask": torch.ones(2, 5).bool()}, r"frame_mask is torch.bool \(2, 5\)"),
        ({"frame_mask": torch.ones(2, 6)}, "frame_mask is torch.float32"),
        ({"aggregate": "max"}, "aggregate='max'"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], message: str) -> None:
    model = BUILD["CLIPVisionModel"]()
    with pytest.raises(ValueError, match=message):
        tokprune.reduce_frames(model, pixels(), **{"segments": 2, "keep": 6, **changes})
    assert hooks(model) == 0


def test_pixels_need_frames() -> None:
    with pytest.raises(ValueError, match=r"pixel_values has shape \(12, 3, 16, 16\)"):
        tokprune.reduce_frames(BUILD["CLIPVisionModel"](), pixels().flatten(0, 1))


@pytest.mark.parametrize("kind", ["siglip", "linear"])
def test_other_models_are_refused(kind: str) -> None:
    vision = {k: v for k, v in VISION.items() if k != "projection_dim"}
    model: Any = nn.Linear(2, 2)
    if kind == "siglip":
        model = SiglipVisionModel(SiglipVisionConfig(**vision))
    with pytest.raises(tokprune.UnsupportedModelError, match="is not a CLIP vision model"):
        tokprune.reduce_frames(model, pixels(), segments=2, keep=6)
