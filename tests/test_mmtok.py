"""MMTok: a slow reference, the features it gets of every kind of tower, words, padding, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_checks.models import Watched
from test_methods_dart_cdpruner_m3 import PROMPTS, SIZES, kept, prefill
from tiny import llava, llava_next, make_inputs
from torch import Tensor

import tokprune
from tokprune.methods import MMTok, QuestionWords
from tokprune.methods.mmtok import keywords
from tokprune.operators import mmtok as operators
from tokprune.operators.mmtok import multimodal_coverage, square_padding
from tokprune.testing import Case, tiny_family


def cosines(x: Tensor, y: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize
    return unit(x.double(), dim=-1) @ unit(y.double(), dim=-1).T


def reference(
    text: Tensor, vision: Tensor, features: Tensor, k: int, excluded: list[int], alpha: float = 0.5
) -> list[int]:
    """Every candidate set of a step written out, in float64."""
    words = (cosines(text, vision) / 0.02).softmax(-1) / len(text)
    tokens = (cosines(features, features) / 0.2).softmax(-1) / len(features)
    rows = torch.cat([words, alpha * tokens])
    chosen: list[int] = []
    for _ in range(k):
        best = (-1.0, -1)
        for j in range(len(vision)):
            if j not in chosen and j not in excluded:
                covered = rows[:, [*chosen, j]].amax(1).sum().item()
                best = max(best, (covered, -j))
        chosen.append(-best[1])
    return chosen


@pytest.mark.parametrize("dense", [True, False])
def test_equals_the_reference(monkeypatch: pytest.MonkeyPatch, dense: bool) -> None:
    if not dense:
        monkeypatch.setattr(operators, "DENSE_LIMIT", 0)
    monkeypatch.setattr(operators, "_CHUNK", 7)
    torch.manual_seed(0)
    text, vision, features = torch.randn(2, 4, 6), torch.randn(2, 20, 6), torch.randn(2, 20, 9)
    words = torch.tensor([[True] * 4, [True, True, False, False]])
    excluded = torch.zeros(2, 20, dtype=torch.bool)
    excluded[1, :9] = True
    got = multimodal_coverage(text, vision, features, 11, words=words, excluded=excluded)
    for b, m in enumerate((4, 2)):
        gone = excluded[b].nonzero().flatten().tolist()
        want = reference(text[b, :m], vision[b], features[b], 11, gone)
        assert got[b].tolist() == want


def test_edges_of_the_operator() -> None:
    vision = torch.eye(4)[None]
    none = multimodal_coverage(vision[:, :0], vision, vision, 4, alpha=0)
    assert none.tolist() == [[0, 1, 2, 3]]  # nothing to cover
    three = torch.tensor([[True, True, False, True]])
    assert multimodal_coverage(vision, vision, vision, 3, excluded=three).tolist() == [[2, -1, -1]]
    with pytest.raises(ValueError, match="k is 5"):
        multimodal_coverage(vision, vision, vision, 5)
    with pytest.raises(ValueError, match=r"text has shape \(1, 4, 3\)"):
        multimodal_coverage(vision[..., :3], vision, vision, 2)
    with pytest.raises(ValueError, match="image_temperature 0"):
        multimodal_coverage(vision, vision, vision, 2, image_temperature=0)
    with pytest.raises(ValueError, match="patch 5"):
        square_padding(10, 20, patch=5)


def watched(name: str, prompts: Any, method: Any) -> tuple[Any, Any, Any]:
    tiny = tiny_family(name)
    model, seen = tiny.build(), Watched(method)
    inputs = Case(method, tiny, model, prompts).inputs()
    calls: list[tuple[Tensor, Tensor]] = []
    handle = None
    if merger := getattr(getattr(model.model, "visual", None), "merger", None):
        handle = merger.register_forward_hook(lambda m, args, out: calls.append((args[0], out)))
    with tokprune.compress(model, seen), torch.no_grad():
        model(**inputs)
    if handle is not None:
        handle.remove()
    return model, seen.images, calls


@pytest.mark.parametrize("shape", [[[4, "image", 6], [3, "image", 5]], [[4, "video", 6]]])
@pytest.mark.parametrize("name", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl"])
def test_features_of_a_packed_encoder_are_means_of_patches(name: str, shape: Any) -> None:
    """Those that enter the merger, by cell; read while nothing in the encoder changes."""
    model, images, ((patches, tokens),) = watched(name, shape, MMTok(keep=3))
    area = model.config.vision_config.spatial_merge_size**2
    cells = patches.view(-1, area, patches.shape[-1]).float().mean(1)
    for image in images:
        # which of the merger's tokens each one is
        same = (image.features[:, None] - tokens).abs().amax(-1)
        assert float(same.amin(1).max()) < 1e-5
        torch.testing.assert_close(image.metric, cells[same.argmin(1)])


def test_features_of_a_tower_are_those_of_its_feature_layer() -> None:
    model, seen = llava(), Watched(MMTok(keep=9))
    inputs, images = make_inputs(model, PROMPTS), seen.images
    last = prefill(model, inputs, seen)
    with torch.no_grad():
        pixels = inputs["pixel_values"]
        states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
    for image, want in zip(images, states[:, 1:]):
        assert image.metric is not None
        torch.testing.assert_close(image.metric, want)
    for b, image in enumerate(images):
        assert image.text is not None
        rows = image.text[None], image.features[None], states[b : b + 1, 1:]
        order = multimodal_coverage(*rows, 9)
        assert kept(last, b) == order[0].sort().values.tolist()


def test_projected_tokens_stand_in_behind_an_encoder_method() -> None:
    model = llava()
    inputs = make_inputs(model, PROMPTS)
    for similarity in ("encoder", "projected"):
        both = Watched(MMTok(keep=7, similarity=similarity))
        last = prefill(model, inputs, tokprune.compose(tokprune.FasterVLM(keep=14), both))
        assert last.layers[-1].counts == [[7]] * 3
        assert both.images[0].metric is None
    _, images, _ = watched("gemma3", [[4, "image", 6]], MMTok(keep=3))
    assert images[0].metric is None


def test_tiles_share_the_budget() -> None:
    model = llava_next()
    inputs = make_inputs(model, PROMPTS, SIZES)
    last = prefill(model, inputs, MMTok(keep=14))
    joint = prefill(model, inputs, MMTok(keep=14, scope="image"))
    assert last.layers[-1].counts == joint.layers[-1].counts == [[14]] * 3
    assert [kept(last, b) for b in range(3)] != [kept(joint, b) for b in range(3)]


def test_patches_of_padding_are_never_kept() -> None:
    """Two of six rows are padding; fewer tokens stay where too few others are left."""
    model = llava()
    inputs = make_inputs(model, PROMPTS)
    gone = square_padding(20, 40, side=6 * 14)
    assert gone.tolist() == [*range(6), *range(30, 36)]
    last = prefill(model, inputs, MMTok(keep=20, padded=((20, 40), (7, 7), (40, 20))))
    assert not set(kept(last)) & set(gone.tolist())
    assert all(0 < place % 6 < 5 for place in kept(last, 2))
    few = prefill(model, inputs, MMTok(keep=30, padded=(20, 40)))
    assert few.layers[-1].counts == [[24]] * 3
    with pytest.raises(ValueError, match="padded has 2 sizes for 3 images"):
        prefill(model, inputs, MMTok(keep=20, padded=((20, 40), (7, 7))))


def tokenizer(text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
    assert not add_special_tokens
    return {"input_ids": [3 + sum(map(ord, word)) % 50 for word in text.split()]}


def test_words_of_a_question() -> None:
    """Words of one's own, one question for all or one per image; all of them may be none."""
    model = llava()
    inputs = make_inputs(model, PROMPTS)
    asked = "What is the red thing on the wall?", "", "How many dogs are there?"
    words = QuestionWords(model, asked, tokenizer)
    assert [len(rows) for rows in words.embeds] == [4, 0, 3]
    method = Watched(MMTok(keep=9, text=words))
    last = prefill(model, inputs, method)
    for b, image in enumerate(method.images):
        assert image.text is None
        assert image.metric is not None
        rows = words.embeds[b][None], image.features[None], image.metric[None]
        assert kept(last, b) == multimodal_coverage(*rows, 9)[0].sort().values.tolist()
    one = QuestionWords(model, asked[2], tokenizer, form="question")
    assert len(one.embeds[0]) == 6
    assert "dogs" in repr(MMTok(keep=9, text=one))
    assert kept(prefill(model, inputs, MMTok(keep=9, text=one)), 2)
    two = QuestionWords(model, asked[:2], tokenizer)
    with pytest.raises(ValueError, match="questions has 2 entries for 3 images"):
        prefill(model, inputs, MMTok(keep=9, text=two))
    with pytest.raises(ValueError, match="questions is empty"):
        QuestionWords(model, [], tokenizer)
    with pytest.raises(ValueError, match="form='all' should be one of"):
        QuestionWords(model, "?", tokenizer, form="all")  # type: ignore[arg-type]


def test_keywords() -> None:
    assert keywords("Is THE cat's bowl in A box?") == "cat s bowl in box"
    assert keywords("Who? Answer the question using a single word or phrase") != "Who?"


def test_option_errors() -> None:
    with pytest.raises(ValueError, match="text='words' should be 'prompt' or QuestionWords"):
        MMTok(keep=9, text="words")  # type: ignore[arg-type]
    for padded in ((), (3, 0), (1, 2, 3), ((1, 2), (3,)), "ab"):
        with pytest.raises(ValueError, match=r"padded=.* should be"):
            MMTok(keep=9, padded=padded)  # type: ignore[arg-type]
