"""Answers of lmms-eval's classes for families beside LLaVA (:mod:`other_bases`)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import other_bases
import pytest
import torch
from other_bases import BASES, CASES
from pictures import landscape
from requests_of import inputs_of, items, model_of, requests, told

import tokprune
from tokprune.families import bind
from tokprune.integrations.lmms_eval.arguments import read_arguments
from tokprune.integrations.lmms_eval.driver import check_dtype
from tokprune.integrations.lmms_eval.wrapped import BASES as USUAL
from tokprune.integrations.lmms_eval.wrapped import Base, fit_processor, parameters

Load = Callable[..., Any]
METHODS = ("divprune", "fastv", "visionzip")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return other_bases.save(tmp_path_factory.mktemp("bases"))


@pytest.fixture(autouse=True)
def _stand_in() -> Iterator[None]:
    yield from other_bases.stand_in()


@pytest.fixture
def loaded(load: Load, home: Path) -> Load:
    """A wrapped model by base, class and arguments."""

    def get(base: str, simple: bool, more: str = "", **options: Any) -> Any:
        return load(more, simple=simple, start=other_bases.start(home, base), **options)

    return get


def see(doc: Any) -> list[Any]:
    """Two images of different shapes."""
    return [landscape().resize((48, 40)), landscape().resize((72, 24))]


def placeholders(lm: Any, given: dict[str, Any]) -> list[int]:
    """Visual tokens of every row of a prompt."""
    visual: torch.Tensor = lm._tokprune.observer.bound.parts.visual(given["input_ids"])
    return visual.sum(1).tolist()


# ------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(("base", "simple"), CASES)
def test_numbers_are_those_of_the_trace(loaded: Load, base: str, simple: bool) -> None:
    lm = loaded(base, simple, "method=divprune,keep=0.5")
    assert lm.is_simple is simple
    seen = inputs_of(lm)
    (result,) = lm.generate_until(requests(lm, items(1), see))
    (first,) = told([result])
    assert (first["status"], first["error"]) == ("ok", None)
    trace = tokprune.trace_of(model_of(lm))
    assert trace is not None
    expected = trace.to_dict()
    assert [first["tokens_in"]] == placeholders(lm, seen[0]) == expected["visual_tokens_in"]
    assert [first["tokens_last"]] == expected["visual_tokens_out"]
    assert first["tokens_last"] == first["tokens_in"] // 2 > 0
    assert first["macs"] == expected["macs"]["total"] < first["macs_unpruned"]
    assert first["macs_unpruned"] == expected["macs_unpruned"]["total"]
    assert first["kv_bytes"] == expected["kv_bytes"] < first["kv_bytes_unpruned"]
    assert first["prompt_tokens"] == int(seen[0]["attention_mask"].sum())
    assert first["new_tokens"] == expected["decode_steps"] + 1
    assert first["images"] == 2
    assert 0 < first["prefill_seconds"] < first["seconds"]


@pytest.mark.parametrize(("base", "simple"), CASES)
def test_unpruned_numbers_are_those_that_a_method_is_compared_with(
    loaded: Load, base: str, simple: bool
) -> None:
    pruned, plain = loaded(base, simple, "method=divprune,keep=0.5"), loaded(base, simple)
    (one,) = told(pruned.generate_until(requests(pruned, items(1), see)))
    (two,) = told(plain.generate_until(requests(plain, items(1), see)))
    assert two["images"] == 2
    assert two["tokens_in"] == two["tokens_last"] == two["tokens_mean"]
    assert two["macs"] == two["macs_unpruned"] > 0
    for name in ("tokens_in", "macs_unpruned", "kv_bytes_unpruned", "prompt_tokens"):
        assert one[name] == two[name], name


@pytest.mark.parametrize(("base", "simple"), CASES)
def test_answers_are_those_of_the_patched_model(loaded: Load, base: str, simple: bool) -> None:
    """Of methods before the decoder, in it, and with a look at the vision encoder."""
    for method in METHODS:
        options: dict[str, Any] = {"keep": 0.5}
        if (method, base) == ("fastv", "qwen3_5"):
            options["prune_before"] = 4  # by the attention of a layer that has some
        more = ",".join(f"{name}={value}" for name, value in {"method": method, **options}.items())
        lm = loaded(base, simple, more)
        seen, made = inputs_of(lm), requests(lm, items(1), see)
        made[0].args[1 if simple else 2]["temperature"] = 0  # qwen3_5 samples unless told otherwise
        (result,) = lm.generate_until(made)
        assert told([result])[0]["error"] is None, method
        model, given = model_of(lm), seen[0]
        lm.clean()
        with tokprune.compress(model, method, **options):
            out = model.generate(**given)
        new = out[0, given["input_ids"].shape[1] :]
        assert result.text == lm.tokenizer.decode(new, skip_special_tokens=True), method
        # else positions have one axis, and images of Gemma 3 do not see each other both ways
        if base != "internvl_hf":
            assert {"mm_token_type_ids", "token_type_ids"} & set(given), base


def test_rows_of_a_batch_carry_its_means(loaded: Load) -> None:
    chosen = items(2)
    for base, simple in (("qwen2_5_vl", False), ("qwen3_vl", True), ("gemma3", True)):
        alone = loaded(base, simple, "method=fastv,keep=0.5")
        one = told(alone.generate_until(requests(alone, chosen, see)))
        both = loaded(base, simple, "method=fastv,keep=0.5", batch_size=2)
        two = told(both.generate_until(requests(both, chosen, see)))
        for name in ("macs", "prompt_tokens", "tokens_mean", "kv_bytes", "images"):
            expected = fmean(row[name] for row in one)
            assert two[0][name] == two[1][name] == pytest.approx(expected, abs=1e-4), (base, name)


# ------------------------------------------------------------------------------ controls


@pytest.mark.parametrize(("base", "simple"), CASES)
def test_controls_change_the_images(loaded: Load, base: str, simple: bool) -> None:
    plain, blind = loaded(base, simple), loaded(base, simple, "control=blind")
    shown, grey = inputs_of(plain), inputs_of(blind)
    plain.generate_until(requests(plain, items(1), see))
    (hidden,) = told(blind.generate_until(requests(blind, items(1), see)))
    assert hidden["status"] == "ok"
    one, two = shown[0]["pixel_values"], grey[0]["pixel_values"]
    assert one.shape == two.shape
    channel = two.flatten(1)[:, : 2 * 4 * 4] if two.dim() == 2 else two[:, 0].flatten(1)
    assert float((channel - channel[:, :1]).abs().max()) < 0.02
    assert not torch.allclose(one, two)


@pytest.mark.parametrize("base", ["qwen2_vl", "internvl_hf", "gemma3"])
def test_what_smaller_images_would_cost_is_known_where_size_does_not_matter(
    loaded: Load, base: str
) -> None:
    simple = base != "internvl_hf"
    lm = loaded(base, simple, "control=downsample,factor=2")
    (first,) = told(lm.generate_until(requests(lm, items(1), see)))
    assert first["status"] == "ok"
    assert first["tokens_last"] > 0
    known = [first[n] is not None for n in ("tokens_in", "macs_unpruned", "prompt_tokens")]
    assert known == [base == "gemma3"] * 3


# ------------------------------------------------------------------------ what is there


def test_bases_of_families(home: Path) -> None:
    for base, (family, *_) in BASES.items():
        assert USUAL[bind(tokprune.load(home / family)).family.name] == base


def test_arguments_of_classes_above_are_known() -> None:
    read = read_arguments("base=qwen3_5,attn_implementation=eager,max_pixels=4096")
    takes, open_ended = parameters(read.base_class)
    assert {"device_map", "attn_implementation", "max_frames", "enable_thinking"} <= set(takes)
    assert takes["max_num_frames"] == 768  # its own, not that of the class above
    assert open_ended
    with pytest.raises(ValueError, match="Did you mean 'attn_implementation'"):
        read_arguments("base=qwen3_5,attn_implementatio=eager")


@pytest.mark.parametrize(
    ("base", "args", "sizes"),
    [
        ("qwen2_vl", {}, (3136, 602112)),
        ("qwen2_5_vl", {"max_pixels": 501760}, (256 * 28 * 28, 501760)),
        ("qwen3_vl", {}, (4 * 32 * 32, 16384 * 32 * 32)),
        ("internvl_hf", {"max_patches": 6}, (1, 6)),
    ],
)
def test_budgets_are_matched_on_images_as_the_base_shows_them(
    home: Path, base: str, args: dict[str, Any], sizes: tuple[int, int]
) -> None:
    _, processor = tokprune.load(home / BASES[base][0], processor=True)
    fit_processor(processor, Base(base, frozenset()), args)
    images = processor.image_processor
    found = dict(images.size)
    if base == "internvl_hf":
        assert (images.min_patches, images.max_patches) == sizes
    else:
        assert (found["shortest_edge"], found["longest_edge"]) == sizes


@pytest.mark.parametrize(
    ("base", "asked", "loaded", "advice"),
    [
        ("gemma3", "auto", "bfloat16", ""), ("gemma3", "bfloat16", "bfloat16", ""),
        ("gemma3", "auto", "float32", "give dtype=bfloat16"),
        ("gemma3", "float32", "float32", "give dtype=bfloat16"),
        ("qwen2_vl", "auto", "float32", ""), ("qwen2_vl", "float32", "float32", "leave dtype out"),
    ],
)  # fmt: skip
def test_dtypes_are_those_of_the_base(base: str, asked: str, loaded: str, advice: str) -> None:
    made = Base(base, frozenset(parameters(read_arguments(f"base={base}").base_class)[0]))
    if not advice:
        check_dtype(made, asked, loaded)
        return
    with pytest.raises(ValueError, match=f"dtype={asked}: lmms-eval's {base} takes none.*{advice}"):
        check_dtype(made, asked, loaded)


@pytest.mark.parametrize("base", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_missing_utils_are_named_before_weights(base: str, monkeypatch: Any) -> None:
    for name in {f"lmms_eval.models.simple.{n}" for n in BASES} & set(sys.modules):
        if hasattr(sys.modules[name], "_has_qwen_vl"):
            monkeypatch.setattr(sys.modules[name], "_has_qwen_vl", False)
    message = rf"{base} needs qwen-vl-utils, which is not installed \(.*'tokprune\[eval\]'\)"
    with pytest.raises(ImportError, match=message):
        read_arguments(f"base={base},pretrained=x")


@pytest.mark.parametrize(
    ("base", "module", "package"),
    [("gemma3", "av", "av"), ("qwen2_vl", "decord", "decord"), ("llava_hf", "decord", "decord")],
)
def test_missing_packages_are_named(
    base: str, module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    for kind in ("chat", "simple"):
        monkeypatch.delitem(sys.modules, f"lmms_eval.models.{kind}.{base}", raising=False)
    monkeypatch.delitem(sys.modules, "lmms_eval.models.model_utils.load_video", raising=False)
    with pytest.raises(ImportError, match=rf"{base} needs {package}, .*pip install {package}, or"):
        read_arguments(f"base={base},pretrained=x")


def test_the_other_package_s_onevision_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'llava_onevision' cannot be used.*base=llava_hf takes"):
        read_arguments("base=llava_onevision,pretrained=x")
