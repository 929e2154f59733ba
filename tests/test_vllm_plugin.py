"""The plug-in for vLLM as far as it can be seen without vLLM: settings, refusals, plans."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import METHODS
from transformers import AutoConfig

import tokprune
from tokprune.cli import app
from tokprune.engine.encoder import EncoderHooks
from tokprune.engine.model import Tiles
from tokprune.errors import UnsupportedModelError
from tokprune.families import bind
from tokprune.integrations.vllm.architectures import PREFIX, SERVED, served_by
from tokprune.integrations.vllm.host import PlanHost
from tokprune.integrations.vllm.hosts import Hosts, decoded, encoded, keep_of, without_keep
from tokprune.integrations.vllm.setting import ServedSetting
from tokprune.integrations.vllm.twin import twin_of
from tokprune.integrations.vllm.versions import why_not
from tokprune.methods import make_method
from tokprune.methods.setting import save_setting
from tokprune.models import resolve
from tokprune.testing import tiny_family
from tokprune.vllm import overrides

LLAVA = "TokpruneLlavaForConditionalGeneration"


def config(**setting: Any) -> Any:
    """The embedded model's, with a setting."""
    made = AutoConfig.from_pretrained(resolve("mini"))
    made.architectures = [LLAVA]
    if setting:
        made.tokprune = setting
    return made


# ------------------------------------------------------------------------------- settings


def test_forms_of_a_setting_are_one() -> None:
    forms: list[dict[str, Any]] = [
        {"method": "divprune", "keep": 64},
        {"method": "divprune", "options": {"keep": 64}},
        {"method": "divprune", "keep": 64, "order": "spatial"},
        {"schema": 2, "method": "divprune", "options": {"keep": 64}, "evidence": {}},
    ]
    read = [ServedSetting.read(form) for form in forms]
    assert len(set(read)) == 1
    assert len({own.digest for own in read}) == 1
    assert ServedSetting.read(read[0].as_json()) == read[0]
    assert json.loads(json.dumps(read[0].as_json())) == forms[1]


def test_every_setting_survives_its_json() -> None:
    for name, options in METHODS.values():
        own = ServedSetting(make_method(name, **options))
        assert ServedSetting.read(json.loads(json.dumps(own.as_json()))) == own


def test_digests_tell_settings_apart() -> None:
    cases = [{"keep": 64}, {"keep": 63}, {"keep": 64, "order": "published"}, {"keep": 0.5}]
    digests = [ServedSetting.read({"method": "divprune", **case}).digest for case in cases]
    digests.append(ServedSetting.read({"method": "grid", "keep": 64}).digest)
    digests.append(ServedSetting.read({"method": "none"}).digest)
    assert len(set(digests)) == len(digests)
    most = ServedSetting.read({"method": "divprune", "keep": 64, "max_keep": 100})
    assert most.digest == digests[0]  # says nothing of what an image leaves


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({}, "says nothing about 'tokprune'"),
        ({"keep": 64}, "name of a 'method'"),
        ({"method": "divprun", "keep": 64}, "Did you mean 'divprune'"),
        ({"method": "divprune"}, "'keep' is required"),
        ({"method": "divprune", "keep": 0}, "keep=0"),
        ({"method": "divprune", "options": {"keep": 6}, "kept": 3}, "'kept' stands beside"),
        ({"method": "divprune", "keep": 6, "max_keep": 0}, "keep=0"),
        ({"method": "visionzip", "dominant": 4, "contextual": 2, "max_keep": 9}, "other options"),
    ],
)
def test_bad_settings(setting: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ServedSetting.of(config(**setting))


# ------------------------------------------------------------------------------- overrides


def test_overrides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "setting.json"
    save_setting({"schema": 2, "method": "divprune", "options": {"keep": 64}}, file)
    want = {
        "architectures": [LLAVA],
        "tokprune": {"method": "divprune", "options": {"keep": 64}},
    }
    assert overrides("mini", str(file)) == want
    assert overrides("mini", file) == want
    assert overrides("mini", "divprune", keep=64) == want
    assert overrides("mini", make_method("divprune", keep=64)) == want
    assert overrides("mini", json.loads(file.read_text())) == want
    assert tokprune.vllm.served_models() == sorted(SERVED)
    for words in (["--setting", str(file)], ["--method", "divprune", "--keep", "64"]):
        with pytest.raises(SystemExit) as done:
            app(["vllm-overrides", "mini", *words])
        assert not done.value.code
        assert json.loads(capsys.readouterr().out) == want
    with_most = overrides("mini", "divprune", keep=64, max_keep=144)
    assert ServedSetting.read(with_most["tokprune"]).max_keep == 144


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["mini"], "--setting FILE, or --method NAME"),
        (["mini", "--setting", "none.json"], "no such file"),
        (["mini", "--method", "fastv", "--keep", "9"], "one length for all layers"),
        (["mini", "--method", "prumerge"], "depends on the picture"),
        (["mini", "--method", "grid", "--keep", "9", "--max-keep", "900"], "at most 576"),
    ],
)
def test_bad_overrides(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        app(["vllm-overrides", *words])
    assert done.value.code == 2
    assert said in capsys.readouterr().err


# -------------------------------------------------------------------------------- requests


def test_keep_of_a_request() -> None:
    assert keep_of({}) is None
    kwargs = {"tokprune": {"keep": 9}, "size": 3}
    assert keep_of(kwargs) == 9
    assert without_keep(kwargs) == {"size": 3}
    keeps: list[int | float | None] = [None, 1, 1.0, 64, 0.25]
    back = [decoded(encoded(keep)) for keep in keeps]
    assert back == keeps
    assert [type(own) for own in back] == [type(own) for own in keeps]
    for bad in ({}, {"keep": None}, {"keep": True}, {"keep": "9"}, {"keep": 9, "seed": 1}, 9):
        with pytest.raises(ValueError, match="and nothing else"):
            keep_of({"tokprune": bad})


def test_counts_of_requests() -> None:
    hosts = Hosts(config(method="divprune", options={"keep": 64}, max_keep=100))
    layout = hosts.layout(300, 80)
    assert [hosts.count(layout, keep) for keep in (None, 9, 100, 0.1)] == [64, 9, 100, 58]
    whole = Hosts(config(method="divprune", options={"keep": 64}, max_keep=1.0))
    assert [whole.count(layout, keep) for keep in (1, 1.0)] == [1, 576]
    with pytest.raises(ValueError, match=r"leaves 101 tokens of this image.*at most 100"):
        hosts.count(layout, 101)
    assert Hosts(config(method="none")).count(layout) == 576
    with pytest.raises(ValueError, match="switched off"):
        Hosts(config(method="none")).count(layout, 9)
    with pytest.raises(ValueError, match="at most 64"):
        Hosts(config(method="divprune", keep=64)).count(layout, 65)


def test_counts_of_tiles() -> None:
    made = tiny_family("internvl").build().config
    made.architectures = ["TokpruneInternVLForConditionalGeneration"]
    made.tokprune = {"method": "divprune", "keep": 0.5}
    hosts = Hosts(made)
    assert [hosts.count(hosts.tiles(number)) for number in (1, 4)] == [4, 18]
    told = [(words, layout.count) for words, layout in hosts.examples()]
    assert told == [("1 tile", 9), ("5 tiles", 45)]
    made = tiny_family("gemma3").build().config
    made.architectures = ["TokpruneGemma3ForConditionalGeneration"]
    made.tokprune = {"method": "divprune", "keep": 0.5}
    ((words, layout),) = Hosts(made).examples()
    assert (words, layout.count) == ("32×32 pixels", 16)


# -------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("fastv", {"keep": 64}, "one length for all layers"),
        ("sparsevlm", {"keep": 64, "prune_before": (1, 2)}, "one length for all layers"),
        ("todre", {"keep": 64}, "one length for all layers"),
        ("cdpruner", {"keep": 64, "relevance": "text"}, "chooses by the question"),
        ("trim", {"keep": 64}, "chooses by the question"),
        ("prumerge", {}, "depends on the picture"),
        ("divprune", {"keep": 64, "positions": "preserve"}, "only with M-RoPE"),
        ("divprune", {"keep": 64, "rectify": "size"}, "leave rectify out"),
        ("tome", {"r": 4}, "kernels in vLLM take neither masks nor biases"),
        ("centerclip", {"keep": 64, "place": "encoder"}, "neither masks nor biases"),
    ],
)
def test_what_cannot_work_says_why(method: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"tokprune in vLLM: .*{words}"):
        hosts = Hosts(config(method=method, options=options))
        hosts.count(hosts.layout(336, 336))


def test_architectures() -> None:
    assert served_by([LLAVA]) == served_by([LLAVA.removeprefix(PREFIX)])
    with pytest.raises(UnsupportedModelError, match="should be one of Llava"):
        served_by(["PaliGemmaForConditionalGeneration"])


def test_towers_that_are_not_served_are_named() -> None:
    made = tiny_family("llava-pixtral").build().config
    made.architectures = [LLAVA]
    with pytest.raises(UnsupportedModelError, match="'pixtral' is not served"):
        twin_of(made)


def test_releases() -> None:
    for version in ("0.32.0", "0.33.1+cpu", "0.33.0rc1", "dev", "0.0.0.dev1"):
        assert why_not(version) is None
    for version in ("0.31.2", "0.34.0", "1.0.0"):
        assert f"vLLM {version}: it should be at least 0.32" in str(why_not(version))


def test_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    (entry,) = importlib.metadata.entry_points(group="vllm.general_plugins", name="tokprune")
    known: dict[str, str] = {}
    registry = types.SimpleNamespace(register_model=known.__setitem__)
    fake = types.SimpleNamespace(ModelRegistry=registry, __version__="0.32.0")
    monkeypatch.setitem(sys.modules, "vllm", fake)
    register = entry.load()
    register()
    register()
    assert known == {
        PREFIX + name: f"tokprune.integrations.vllm.{module}:{PREFIX}{name}"
        for name, module in SERVED.items()
    }


def test_nothing_heavy_is_imported() -> None:
    """Every process of every vLLM runs this, whether it prunes or not."""
    code = (
        "import sys; import tokprune.integrations.vllm; "
        "print([m for m in ('torch', 'transformers', 'vllm') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# ----------------------------------------------------------------------------------- plans


def test_twin_is_the_model_without_weights() -> None:
    model = tiny_family("llava-1.5").build()
    model.config.architectures = [LLAVA]
    twin = twin_of(model.config)
    assert twin.facts == bind(model).facts
    assert {p.device.type for p in twin.model.parameters()} == {"meta"}


CASES = {
    name: METHODS[name]
    for name in (
        "random", "grid", "divprune", "divprune-published", "cdpruner",
        "centerclip", "centerclip-projector", "fastervlm", "vispruner", "scope", "score", "hiprune",
        "prunesid", "prunesid-patches", "hired", "holov", "visionzip", "pool",
    )
}  # fmt: skip
CASES["m3"] = ("m3", {"keep": 9})
CASES["divprune-anchors"] = ("divprune", {"keep": 6, "anchors": 0.5})
CASES["todre"] = ("todre", {"keep": 5, "stage2": False})
CASES["prumerge"] = ("prumerge", {"keep": 4, "plus": True, "neighbours": 3})
CASES["pool-before"] = ("pool", {"keep": 9, "place": "before"})


@pytest.mark.parametrize("own", CASES)
@torch.no_grad()
def test_host_leaves_what_the_patched_model_leaves(own: str) -> None:
    """The same rows in the same order, on the tower and projector of the model itself."""
    name, options = CASES[own]
    tiny = tiny_family("llava-1.5")
    model = tiny.build()
    inputs = tiny.inputs(model, [[4, "image", 6], [3, "image", 9]])
    with tokprune.compress(model, name, **options) as trace:
        want = entering(model, inputs)
    places = [image.entered.column - image.columns[0] for image in trace.last.images]

    bound = bind(model)
    host = PlanHost(make_method(name, **options), bound)
    layouts = bound.family.images(bound.parts, bound.facts, inputs)
    left = host.reduce(layouts, *encode(host, bound, layouts, inputs["pixel_values"]))
    for row, (here, place) in enumerate(zip(left, places)):
        assert here.place.tolist() == place.tolist()
        end = want.shape[1] - (6, 9)[row]  # where the text behind the image begins
        torch.testing.assert_close(here.features, want[row, end - len(place) : end])


def entering(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """What enters the decoder [B, L, D]."""
    seen: list[torch.Tensor] = []
    handle = model.model.language_model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    model(**inputs)
    handle.remove()
    return seen[0]


#: methods that look at the features of an image alone
ON_FEATURES = {
    "divprune": {"keep": 5}, "cdpruner": {"keep": 5}, "grid": {"keep": 5}, "random": {"keep": 5},
    "pool": {"window": 2}, "todre": {"keep": 5, "stage2": False, "pivot": "farthest"},
}  # fmt: skip


@pytest.mark.parametrize("name", ON_FEATURES)
@pytest.mark.parametrize("family", ["qwen3-vl", "internvl", "gemma3"])
@torch.no_grad()
def test_host_on_features_of_an_encoder(family: str, name: str) -> None:
    """The same of models whose encoder is out of reach; and further features, such as those of
    deepstack, move and merge with the tokens."""
    tiny = tiny_family(family)
    model = tiny.build()
    inputs = tiny.inputs(model, [[4, "image", 6]])
    whole = entering(model, inputs)[0]
    with tokprune.compress(model, name, **ON_FEATURES[name]) as trace:
        want = entering(model, inputs)[0]
    (image,) = trace.last.images
    start, place = int(image.columns[0]), image.entered.column - image.columns[0]

    bound = bind(model)
    host = PlanHost(make_method(name, **ON_FEATURES[name]), bound)
    layouts = bound.family.images(bound.parts, bound.facts, inputs)
    packed = whole[start : start + len(image.columns)]
    if isinstance(layouts, Tiles):
        layouts = [layouts.image(len(packed) // layouts.per_tile)]
    (left,) = host.reduce(layouts, [packed])
    assert left.place.tolist() == place.tolist()
    torch.testing.assert_close(left.features, want[start : start + len(place)])
    torch.testing.assert_close(left.follow(packed), left.features)


def encode(host: PlanHost, bound: Any, layouts: Any, pixels: torch.Tensor) -> tuple[Any, ...]:
    """What a server does: tower, projector, packing."""
    parts, facts = bound.parts, bound.facts.tower
    tower = host.start(layouts, pixels.device)
    hooks = EncoderHooks(parts.tower.layers, host.plan.encoder, lambda: tower).install()
    try:
        out = parts.tower.module(pixels, output_hidden_states=True)
    finally:
        for hook in hooks:
            hook.remove()
    tower.finish()
    hidden = out.hidden_states[facts.feature_layer + 1]
    rows = hidden if tower.features is None else tower.features
    projected = parts.tower.projector(rows[:, tower.cut_rows :])
    packed = [None] * len(layouts) if tower.reduced else list(projected)
    return packed, tower, projected
