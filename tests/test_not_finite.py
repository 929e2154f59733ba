"""NaN and infinite pixels: every method on every kind of model says so in the same words, whatever
its own arithmetic would make of them, and never answers."""

from __future__ import annotations

from typing import Any

import family_cases
import methods_table
import pytest
import torch

import tokprune
from tokprune.methods import make_method
from tokprune.testing import tiny_families
from tokprune.testing.case import Case
from tokprune.testing.numbering import prompt_positions

LLAVA = {**methods_table.PRUNING, **methods_table.MERGING}
PROMPTS: list[list[Any]] = [[4, "image", 6], [7, "image", 9]]
CASES: list[Any] = [("llava-1.5", case) for case in LLAVA]
CASES += [("qwen2.5-vl", case) for case in family_cases.METHODS]
CASES += [
    pytest.param(family, case, marks=pytest.mark.full)
    for family in ("llava-next", "gemma3", "internvl", "llava-onevision")
    for case in family_cases.METHODS
]


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {}


def refused(case: Case, inputs: dict[str, Any]) -> None:
    for validate in (False, True):
        with torch.no_grad(), tokprune.compress(case.model, case.method, validate=validate) as log:
            with pytest.raises(tokprune.NonFiniteFeaturesError, match="NaN or infinite"):
                case.model(**inputs, **prompt_positions(case.model, inputs))
            assert log.last is None


@pytest.mark.parametrize(("name", "case"), CASES)
def test_one_bad_value_is_found(models: dict[str, Any], name: str, case: str) -> None:
    family = tiny_families().get(name)
    if family is None:
        pytest.skip("not in this transformers")
    if name not in models:
        models[name] = family.build()
    method, options = (LLAVA if name == "llava-1.5" else family_cases.METHODS)[case]
    work = Case(make_method(method, **options), family, models[name], PROMPTS)
    try:
        with torch.no_grad():
            work.prefill(work.inputs())
    except ValueError:
        pytest.skip("not for these images")
    for value in (float("nan"), float("inf")):
        inputs = work.inputs()
        pixels = inputs["pixel_values"] = inputs["pixel_values"].clone()
        pixels.view(-1)[-1] = value  # of the last image only
        refused(work, inputs)


@pytest.mark.parametrize("case", ["centerclip-spectral", "sparsevlm-rank", "visionzip", "pitome"])
def test_overflow_inside_the_tower_is_found(case: str) -> None:
    family = tiny_families()["llava-1.5"]
    model = family.build()
    method, options = LLAVA[case]
    work = Case(make_method(method, **options), family, model, PROMPTS)
    tower = model.model.vision_tower
    with torch.no_grad():
        next(p for n, p in tower.named_parameters() if "layers.0.mlp.fc2.weight" in n).mul_(1e38)
    refused(work, work.inputs())


def test_errors_of_finite_features_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    family = tiny_families()["llava-1.5"]
    work = Case(make_method("sparsevlm", **LLAVA["sparsevlm-rank"][1]), family, family.build(),
                PROMPTS)  # fmt: skip

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("of its own")

    monkeypatch.setattr(torch.linalg, "matrix_rank", fail)
    monkeypatch.setattr(torch.linalg, "svdvals", fail)
    with pytest.raises(RuntimeError, match="of its own"):
        work.prefill(work.inputs())
