"""Settings from options and files, variants, budgets: what is accepted and what refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tokprune.eval.sweep.budgets import DEFAULT_KEEP, parse_budget, tolerance
from tokprune.eval.sweep.settings import (
    Settings,
    make_settings,
    read_settings,
    with_options,
)
from tokprune.eval.sweep.variants import Variant, build_variants, controls, parse_variant
from tokprune.methods import available_methods, image_methods

BASE: dict[str, Any] = {"model": "m", "out": "o"}


@pytest.mark.parametrize(
    ("given", "tokens"),
    [
        (64, 64), ("64", 64), ("0.25", 144), (0.25, 144), ("25%", 144), ("1/9", 64), ("1.0", 576),
        ("0.05", 28.8),
    ],
)  # fmt: skip
def test_budget_forms(given: Any, tokens: float) -> None:
    assert parse_budget(given).tokens(576) == pytest.approx(tokens)


def test_default_budgets_are_pooling_scales() -> None:
    assert [parse_budget(k).tokens(576) for k in DEFAULT_KEEP[1:]] == [144, 64, 36, 16]
    assert (tolerance(10), tolerance(288)) == (0.5, 2.88)


BAD_SETTINGS = [
    ({"keep": ()}, "keep names no budget"),
    ({"keep": ("0",)}, "keep=0 should be at least 1"),
    ({"keep": ("1.5",)}, "share in"),
    ({"keep": ("abc",)}, "keep='abc' should be a count"),
    ({"keep": ("1/0",)}, "keep=1/0 should be"),
    ({"keep": (True,)}, "keep=True should be"),
    ({"keep": ("nan",)}, "share in"),
    ({"methods": ("fastvv",)}, "Did you mean 'fastv'"),
    ({"methods": ("fastv:prune_befor=2",)}, "Did you mean 'prune_before'"),
    ({"methods": ("fastv:prune_before",)}, "should be name=value"),
    ({"methods": ("fastv:prune_before=-1",)}, "prune_before=-1 should be"),
    ({"methods": ("fastv:prune_before=two",)}, "prune_before='two' should be"),
    ({"methods": ("todre:keep=9",)}, "'keep' of todre is a budget"),
    ({"methods": ("tome:r=4",)}, "'r' of tome is a budget"),
    ({"methods": ("none:x=1",)}, "takes no options"),
    ({"methods": (3,)}, "should be a list|should be a name"),
    ({"methods": ({"select": "k_center", "tau": 1},)}, "should have a name"),
    ({"tasks": ()}, "tasks names no task"),
    ({"tasks": (1,)}, "tasks: 1 should be text"),
    ({"seeds": ()}, "seeds names no seed"),
    ({"seeds": (-1,)}, "seeds: -1"),
    ({"match": "median"}, "match='median' should be one of mean, last"),
    ({"dtype": "int8"}, "dtype='int8' should be one of"),
    ({"device": "tpu"}, "device='tpu' should be one of"),
    ({"batch_size": 0}, "batch_size=0 should be a whole number"),
    ({"batch_size": True}, "batch_size=True should be a whole number"),
    ({"limit": 0}, "limit=0 should be"),
    ({"noise": "yes"}, "noise='yes' should be true or false"),
    ({"model": ""}, "model='' should be text"),
    ({"executor": "dask"}, "executor='dask' should be one of local, ray"),
    ({"address": "a:1"}, "address='a:1' belongs to executor ray, and executor is local"),
    ({"workers": 2}, "workers=2 belongs to executor ray, and executor is local"),
    ({"executor": "ray", "workers": 0}, "workers=0 should be a whole number, at least 1"),
    ({"executor": "ray", "address": ""}, "address='' should be text"),
    ({"keep": 4.5}, "share in"),
    ({"seeds": 1.5}, "seeds: 1.5"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BAD_SETTINGS)
def test_bad_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**{**BASE, **changes})


def test_single_values_stand_for_lists() -> None:
    made = Settings(**BASE, keep=64, methods="fastv", seeds=3, tasks="count")
    assert (made.keep, made.methods, made.seeds, made.tasks) == (
        (64,),
        ("fastv",),
        (3,),
        ("count",),
    )


def test_same_budget_twice_is_one() -> None:
    assert len(Settings(**BASE, keep=("64", 64, "0.5", "50%")).budgets()) == 2


def test_files(tmp_path: Path) -> None:
    text = (
        "model: m\nout: o\nkeep: [64, 1/9]\nmethods:\n- fastv:prune_before=3\n- todre: {tau: 0.2}\n"
    )
    (tmp_path / "a.yaml").write_text(text)
    (tmp_path / "a.toml").write_text(
        'model = "m"\nout = "o"\nkeep = [64, "1/9"]\nmethods = ["fastv:prune_before=3", '
        '{name = "todre", tau = 0.2}]\n'
    )
    from_yaml, from_toml = (read_settings(tmp_path / f"a.{kind}") for kind in ("yaml", "toml"))
    assert from_yaml.to_dict() == from_toml.to_dict()
    assert from_yaml.to_dict()["methods"] == [
        {"name": "fastv", "prune_before": 3}, {"name": "todre", "tau": 0.2},
    ]  # fmt: skip
    assert read_settings(tmp_path / "a.yaml", out="elsewhere", keep=None).out == "elsewhere"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.yaml",
            "model: m\nout: o\nmethod: [fastv]\n",
            "'method' is unknown. Did you mean 'methods'",
        ),
        ("a.yaml", "model: m\n", "'out' is missing"),
        ("a.yaml", "- 1\n", "should be a table"),
        ("a.yaml", "model: [m\n", "a.yaml, line 2"),
        ("a.toml", "model = m\n", "a.toml"),
        ("a.json", "{}", "should be a .yaml or a .toml"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_settings(tmp_path / name)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_settings(tmp_path / "none.yaml")


# --------------------------------------------------------------------------------- variants


def test_all_methods_and_controls_by_default() -> None:
    variants = build_variants([], with_controls=True, published=False)
    assert [variant.name for variant in variants][:6] == list(controls())
    assert {variant.method for variant in variants if variant.method} == set(image_methods())
    assert {variant.name for variant in variants if variant.control} == set(controls())
    unpatched = [variant.name for variant in variants if variant.method is None]
    assert unpatched == ["none", "blind", "downsample"]
    assert len(variants) == len(image_methods()) + len(unpatched)


def test_the_unpruned_model_is_always_there() -> None:
    variants = build_variants([("fastv", {})], with_controls=False, published=False)
    assert [variant.name for variant in variants] == ["none", "fastv"]


def test_variants_are_possible_options() -> None:
    names = [variant.name for variant in build_variants([], with_controls=False, published=True)]
    assert len(names) == len(set(names))
    assert "todre+select=k_center" in names
    for name, cls in available_methods().items():
        for options in cls.variants:
            parse_variant({"name": name, **options})
            Variant(name, False, options).at(9, 8)


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        ("todre:select=k_center:tau=0.2", ("todre", {"select": "k_center", "tau": 0.2})),
        ("MustDrop:window=(2, 2)", ("mustdrop", {"window": (2, 2)})),
        ({"name": "fastv", "prune_before": 3}, ("fastv", {"prune_before": 3})),
        ({"mustdrop": {"window": [2, 2]}}, ("mustdrop", {"window": (2, 2)})),
        ({"fastv": None}, ("fastv", {})),
        (
            'vispruner:anchors={"share": 0.3, "place": "last"}:rectify=size',
            ("vispruner", {"anchors": {"share": 0.3, "place": "last"}, "rectify": "size"}),
        ),
        (
            {"occamtoken": {"neurons": [[3, 4], [0, 5]]}},
            ("occamtoken", {"neurons": ((3, 4), (0, 5))}),
        ),
    ],
)
def test_variant_forms(spec: Any, wanted: Any) -> None:
    assert parse_variant(spec) == wanted


def test_different_options_have_different_file_names() -> None:
    values = [(2, 2), (2, 3), "a/b", "a-b", 0.5, 0.25, True, None, "True"]
    names = [Variant("mustdrop", False, {"x": value}).name for value in values]
    assert len(set(names)) == len(values)
    assert all(re.fullmatch(r"[A-Za-z0-9_.+=-]+", name) for name in names)


def test_only_stochastic_variants_take_seeds() -> None:
    stochastic = {variant.name for variant in build_variants([], True, False) if variant.stochastic}
    assert stochastic == {"random"}
    assert Variant("todre", False, {"pivot": "random"}).stochastic
    assert Variant("random", True).at(9, 8, seed=5).seed == 5  # type: ignore[attr-defined]
    assert Variant("todre", False).at(9, 8, seed=5).seed == 0  # type: ignore[attr-defined]


def test_options_on_the_command_line_change_variants() -> None:
    changed = with_options(["todre", "fastv"], ["todre.select=k_center", "todre.tau=0.3"])
    assert [parse_variant(spec) for spec in changed] == [
        ("todre", {"select": "k_center", "tau": 0.3}), ("fastv", {}),
    ]  # fmt: skip
    every = [parse_variant(spec) for spec in with_options([], ["fastv.prune_before=3"])]
    assert ("fastv", {"prune_before": 3}) in every
    assert len(every) > 5
    assert with_options(["fastv"], []) == ("fastv",)
    for bad, message in [
        ("fastv", "method.option=value"), ("fastv.prune_before", "name=value"),
        ("fastv.prune_befor=3", "Did you mean 'prune_before'"),
        ("todre.tau=1", "not among the swept"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            with_options(["fastv"], [bad])


def test_unknown_setting_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="here: setting 'budgets' is unknown"):
        make_settings({**BASE, "budgets": 3}, "here")


def test_names_of_the_release_before_are_taken_with_a_warning() -> None:
    with pytest.warns(FutureWarning, match="'own' is called 'builtin'"):
        assert make_settings({**BASE, "harness": "own"}, "here").harness == "builtin"
    with pytest.warns(FutureWarning, match="'exact' of random is called 'as_published'"):
        assert parse_variant("random:keep=9:exact=True")[1] == {"keep": 9, "as_published": True}


STUDIES = sorted((Path(__file__).parents[1] / "evals" / "studies").glob("*.yaml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_studies_are_settings(path: Path) -> None:
    settings = read_settings(path)
    assert settings.budgets()
    media = "video" if settings.benchmark == "mini-video" else "image"
    assert len(settings.compared(media)) > 5
    assert path.name in (path.parents[1] / "README.md").read_text() or "-vqav2" in path.stem


def test_there_are_studies() -> None:
    assert {path.stem for path in STUDIES} >= {"mini", "mini-video", "llava-1.5-7b"}
