"""Rectified attention in models: against the oracle, under every backend, in conversations."""

from collections import Counter
from typing import Any

import pytest
import torch
from family_cases import FLASH, SHAPES, TURN, case_of, model_of, plain_backend
from flash_double import flash_double
from torch import Tensor
from torch.nn.functional import normalize

import tokprune
from tokprune.errors import UnsupportedModelError
from tokprune.eval.sweep.trials import json_options
from tokprune.families import bind
from tokprune.methods import make_method
from tokprune.methods.setting import load_setting
from tokprune.testing import assert_same_logits, continuation_tokens, tiny_family
from tokprune.testing.case import Case, dropped
from tokprune.testing.checks.host_reads import can_find_host_reads, host_read
from tokprune.testing.checks.numbers import Compared, equals_oracle, keeps_everything, runs_in
from tokprune.testing.families import REPRESENTATIVE
from tokprune.testing.generated import forced_logits, recorded_layers

BOTH = {"size": True, "distance": True, "distance_in_decode": True}

#: method, its options, and what is rectified
CASES: dict[str, tuple[str, dict[str, Any], Any]] = {
    "input": ("divprune", {"keep": 4}, "size"),
    "input-distance": ("divprune", {"keep": 4, "positions": "preserve"}, BOTH),
    "decoder": ("fastv", {"keep": 4, "prune_before": 2}, "size"),
    "decoder-distance": ("fastv", {"keep": 4, "prune_before": 1}, "size+distance"),
    "distance": ("fastv", {"keep": 4, "prune_before": 1}, "distance"),
    "tower": ("fastervlm", {"keep": 4}, {"first_layer": "size"}),
    "tower-merged": ("visionzip", {"keep": 5}, {"dropped": "none"}),
    "merged": ("centerclip", {"keep": 4}, {**BOTH, "first_layer": "size", "c": 1.5}),
}


def compared(name: str, family: str, backend: str, shape: str) -> tuple[Case, Compared]:
    method, options, rectify = CASES[name]
    made = make_method(method, **options, rectify=rectify)
    case = case_of(made, family, SHAPES[shape], model_of(family, backend))
    oracle = model_of(family, plain_backend(family))
    turn = TURN if shape == "turn" else 0
    # two kernels round differently
    tolerance = 3 * case.family.tolerance
    return case, equals_oracle(case, turn=turn, oracle=oracle, tolerance=tolerance)


#: a second turn in these is enough: the others have the same caches
TURNING = ("llava-1.5", "qwen2.5-vl", "gemma3")
CELLS = [
    pytest.param(family, shape, marks=pytest.mark.full)
    if shape == "turn" and family not in TURNING
    else (family, shape)
    for family in REPRESENTATIVE
    for shape in ("ragged", "turn")
]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("family", "shape"), CELLS)
def test_equals_the_oracle(family: str, name: str, shape: str) -> None:
    backends = tiny_family(family).backends
    for backend in backends:
        case, found = compared(name, family, backend, shape)
        assert dropped(found.prefill)
        assert found.got is not None
        plain = equals_oracle(case.having(method=make_method(CASES[name][0], **CASES[name][1])))
        assert plain.got is not None
        assert not torch.allclose(found.got[:, :1], plain.got[:, :1], atol=1e-4)


@pytest.mark.parametrize("family", ["llava-1.5", "qwen2.5-vl", "internvl"])
def test_sizes_go_through_flash_attention(family: str) -> None:
    with flash_double() as calls:
        for name in ("input", "decoder", "tower-merged"):
            if name == "tower-merged" and family != "llava-1.5":
                continue
            _, found = compared(name, family, FLASH, "turn")
            assert dropped(found.prefill)
        widths = {call.query[-1] for call in calls if call.causal}
        assert len(widths) == 2, "some layers of the decoder are wider by channels, others not"
        case = case_of(
            make_method("divprune", keep=4, rectify="distance"), family, SHAPES["single"],
            model_of(family, FLASH),
        )  # fmt: skip
        with pytest.raises(UnsupportedModelError, match=r"or use rectify=.size."):
            case.prefill(case.inputs())
        assert not tokprune.is_patched(case.model)


# ------------------------------------------------------------------ sizes


def brute_nearest(x: Tensor, kept: list[int], among: list[int]) -> Counter[int]:
    """How many of ``among`` resemble each of ``kept`` most, these included."""
    unit = normalize(x.double(), dim=-1)
    found = Counter(kept)
    for token in among:
        if token not in kept:
            found[max(kept, key=lambda k: float(unit[token] @ unit[k]))] += 1
    return found


def prefilled(method: Any, family: str = "llava-1.5", shape: str = "two") -> tuple[Any, Any]:
    """What entered the decoder's layers of the unpruned model, and the trace of the compressed."""
    case = case_of(method, family, SHAPES[shape])
    inputs = case.inputs()
    with recorded_layers(case.model) as seen, torch.no_grad():
        case.model(**inputs)
    _, trace = case.prefill(inputs)
    return seen.layers, trace


def check_sizes(hidden: Tensor, trace: Any, layer: int) -> None:
    """By ``hidden`` [L, D] on which the drop before a layer was decided."""
    own = trace.layers[layer]
    segment = torch.full((len(hidden),), -1)
    for image in trace.images:
        segment[image.columns] = image.number
    columns = own.column[0].tolist()
    for image in range(int(segment.max()) + 1):
        members = (segment == image).nonzero().view(-1).tolist()
        kept = [column for column in columns if column in members]
        want = brute_nearest(hidden, kept, members)
        got = {c: own.size[0, at].item() for at, c in enumerate(columns) if c in kept}
        assert got == want
        assert sum(got.values()) == len(members)
    assert all(own.size[0, at] == 1 for at, c in enumerate(columns) if segment[c] < 0)


def test_what_goes_at_the_input_counts_for_the_nearest() -> None:
    layers, trace = prefilled(make_method("divprune", keep=3, rectify="size"))
    check_sizes(layers[0][0], trace, 0)
    check_sizes(layers[0][0], trace, 5)


def test_what_goes_in_the_decoder_counts_for_the_nearest() -> None:
    layers, trace = prefilled(make_method("fastv", keep=3, prune_before=2, rectify="size"))
    assert trace.layers[1].size is None
    check_sizes(layers[2][0], trace, 2)


def test_what_goes_in_the_tower_counts_for_the_nearest() -> None:
    method = make_method("fastervlm", keep=3, rectify="size")
    case = case_of(method, "llava-1.5", SHAPES["single"])
    rows: list[Tensor] = []
    tower = bind(case.model).parts.tower
    assert tower is not None
    facts = bind(case.model).facts.tower
    assert facts is not None
    layer = tower.layers[facts.feature_layer or 0]
    handle = layer.register_forward_hook(
        lambda m, args, out: rows.append(out[0] if isinstance(out, tuple) else out)
    )
    inputs = case.inputs()
    with torch.no_grad():
        case.model(**inputs)
    handle.remove()
    _, trace = case.prefill(inputs)
    columns = trace.images[0].columns
    places = [int(c) for c in trace.layers[0].column[0] if c in columns]
    kept = [place - int(columns[0]) for place in places]
    want = brute_nearest(rows[0].view(-1, rows[0].shape[-1])[1:], kept, list(range(len(columns))))
    at = torch.isin(trace.layers[0].column[0], columns)
    assert trace.layers[0].size[0, at].tolist() == [want[k] for k in kept]


def test_merged_tokens_count_their_members() -> None:
    for method in ("tome", "pitome", "visionzip"):
        options = {"dominant": 3, "contextual": 2} if method == "visionzip" else {"keep": 20}
        made = make_method(method, **options, rectify={"dropped": "none"})
        _, trace = prefilled(made, shape="single")
        record = trace.records[0]
        group = record.group
        want = group[group >= 0].bincount(minlength=record.stands_for.shape[0]).float()
        torch.testing.assert_close(record.stands_for, want.clamp(min=1))  # a class token is one
        assert want.max() > 1


def test_two_drops_add_up() -> None:
    method = tokprune.compose(
        make_method("divprune", keep=6, rectify="size"), make_method("fastv", keep=2)
    )
    _, trace = prefilled(method)
    for layer in trace.layers:
        visual = layer.segment[0] >= 0
        assert layer.size[0, visual].sum() == sum(trace.original_counts)
    assert trace.layers[-1].size[0].max() > trace.layers[0].size[0].max()


# ------------------------------------------------------------------ rows, and conversations


@pytest.mark.parametrize("rectify", ["size", BOTH], ids=["size", "both"])
@pytest.mark.parametrize("method", ["divprune", "fastv"])
def test_a_row_that_loses_nothing_is_left_alone(method: str, rectify: Any) -> None:
    """In a batch with one that does: both as they are alone, and the one as it is unpatched."""
    family = "qwen2.5-vl"
    tiny = tiny_family(family)
    sizes = [(28, 28), (84, 84)]
    options = {"prune_before": 1} if method == "fastv" else {}
    whole = Case(
        make_method(method, keep=16, **options, rectify=rectify), tiny, model_of(family, "sdpa"),
        [[4, "image", 6], [5, "image", 3]], sizes,
    )  # fmt: skip
    inputs, tokens = whole.inputs(), continuation_tokens(2, 3)
    with whole.compress() as trace:
        got = forced_logits(whole.model, inputs, tokens)
    assert trace.last is not None
    before, after = trace.last.original_counts, trace.last.layers[-1].counts
    assert after[0][0] == before[0]
    assert after[1][0] == 16 < before[1]
    for row in range(2):
        alone = whole.row(inputs, row)
        with whole.compress():
            want = forced_logits(whole.model, alone, tokens[row : row + 1])
        assert_same_logits(got[row : row + 1], want, tolerance=2e-5)
    plain = forced_logits(whole.model, whole.row(inputs, 0), tokens[:1])
    assert_same_logits(got[:1], plain, tolerance=2e-5)


@pytest.mark.parametrize("name", ["input", "decoder-distance"])
@pytest.mark.parametrize("family", ["llava-1.5", "gemma3"])
def test_keeping_everything_changes_no_bit(family: str, name: str) -> None:
    method, options, rectify = CASES[name]
    made = make_method(method, **{**options, "keep": 1.0}, rectify=rectify)
    keeps_everything(case_of(made, family, SHAPES["ragged"]))


@pytest.mark.parametrize("name", CASES)
def test_beams_are_rows(name: str) -> None:
    method, options, rectify = CASES[name]
    made = make_method(method, **options, rectify=rectify)
    case = case_of(made, "llava-1.5", SHAPES["ragged"])
    inputs = case.inputs()
    options = {"max_new_tokens": 4, "num_beams": 3, "eos_token_id": None, "pad_token_id": 0}
    with case.compress():
        together = case.model.generate(**inputs, **options)
        for row in range(len(case.prompts)):
            alone = case.model.generate(**case.row(inputs, row), **options)
            assert torch.equal(alone[0, -4:], together[row, -4:])


def test_a_static_cache_has_no_distances_in_steps() -> None:
    made = make_method("divprune", keep=4, rectify=BOTH)
    case = case_of(made, "llava-1.5", SHAPES["single"])
    with case.compress(), pytest.raises(UnsupportedModelError, match="distance_in_decode=True"):
        case.model.generate(**case.inputs(), max_new_tokens=3, cache_implementation="static")


def test_half_precision() -> None:
    for name in ("input", "decoder-distance"):
        method, options, rectify = CASES[name]
        made = make_method(method, **options, rectify=rectify)
        runs_in(case_of(made, "llava-1.5", SHAPES["ragged"]))


@pytest.mark.skipif(not can_find_host_reads(), reason="transformers 4 itself reads placeholders")
@pytest.mark.parametrize("name", [name for name in CASES if CASES[name][0] != "centerclip"])
def test_reads_nothing_back(name: str) -> None:
    method, options, rectify = CASES[name]
    made = make_method(method, **options, rectify=rectify)
    tiny = tiny_family("llava-1.5")  # a model of its own, which is left without values
    assert host_read(Case(made, tiny, tiny.build(), [[4, "image", 6]] * 2)) is None


def test_layers_that_swallow_what_they_are_given_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of(make_method("divprune", keep=4, rectify="size"), "llava-1.5", SHAPES["single"])
    attention = type(bind(case.model).parts.decoder_layers[0].attention)
    forward = attention.forward

    def narrow(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("tokprune_bias", None)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(attention, "forward", narrow)
    with pytest.raises(UnsupportedModelError, match="do not hand their attention"):
        case.prefill(case.inputs())


# ------------------------------------------------------------------ the option


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("sizes", "rectify='sizes' should be one of 'size', 'distance', 'size\\+distance', None"),
        (True, "rectify=True should be one of"),
        ({"scale": 1}, "rectify={'scale': 1}: 'scale' should be one of size, distance"),
        ({"c": 1.0}, "rectify={'c': 1.0}: c=1.0 should be a number above 1"),
        ({"c": "2"}, "c='2' should be a number above 1"),
        ({"dropped": "all"}, "dropped='all' should be one of 'nearest', 'none'"),
        ({"size": False}, "size or distance should be True"),
    ],
)
def test_bad_values(value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_method("divprune", keep=4, rectify=value)


def test_words_and_tables_of_options_are_the_same_setting() -> None:
    word = make_method("divprune", keep=4, rectify="size+distance")
    table = make_method("divprune", keep=4, rectify={"distance": True})
    assert word == table
    assert hash(word) == hash(table)
    assert repr(word).endswith("rectify=Rectify(distance=True))")
    assert "rectify" not in repr(make_method("divprune", keep=4))
    stored = json_options(word)
    assert make_method("divprune", **stored) == word
    setting = {"schema": 2, "method": "divprune", "options": stored, "repr": repr(word)}
    assert load_setting(setting) == word


def test_one_of_a_composition_rectifies_for_all() -> None:
    plain, lifted = make_method("fastv", keep=4), make_method("divprune", keep=8, rectify="size")
    assert tokprune.compose(plain, lifted).rectify == lifted.rectify
    other = make_method("fastv", keep=4, rectify="distance")
    with pytest.raises(tokprune.CompositionError, match="different rectify"):
        tokprune.compose(other, lifted)
