"""``--model_args``: who gets what, and what is refused before any weight is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bases
import pytest
import tiny
import torch
from lmms_eval.models import MODEL_REGISTRY_V2, get_model, list_available_models
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.models.simple.llava_hf import LlavaHf
from transformers import GPT2Config, GPT2LMHeadModel

import tokprune
from tokprune import UnsupportedModelError
from tokprune.integrations.lmms_eval.arguments import Arguments, read_arguments
from tokprune.integrations.lmms_eval.find import find_model
from tokprune.integrations.lmms_eval.model import Tokprune, TokpruneChat


@pytest.fixture(scope="module", autouse=True)
def _batched() -> Iterator[None]:
    manifest = ModelManifest("test_batched", simple_class_path="bases.Batched")
    MODEL_REGISTRY_V2.register_manifest(manifest, overwrite=True)
    yield
    MODEL_REGISTRY_V2._manifests.pop("test_batched")
    MODEL_REGISTRY_V2._alias_to_model_id.pop("test_batched")


def read(text: str, simple: bool = False) -> Arguments:
    return read_arguments(text, simple)


def test_lmms_eval_finds_the_plug_in() -> None:
    assert "tokprune" in list_available_models()
    assert get_model("tokprune") is TokpruneChat
    assert get_model("tokprune", force_simple=True) is Tokprune


def test_arguments_are_sorted() -> None:
    read_ = read("base=llava_hf,pretrained=a/b,dtype=float32,method=todre,keep=64,tau=0.2,"
                 "use_cache=False,select=k_center")  # fmt: skip
    assert read_.method == tokprune.ToDRE(keep=64, tau=0.2, select="k_center")
    assert read_.passed == {"pretrained": "a/b", "dtype": "float32", "use_cache": False}
    assert (read_.base, read_.control) == ("llava_hf", None)


def test_chat_class_unless_simple_is_forced() -> None:
    assert read("base=llava_hf").base_class is not LlavaHf
    assert read("base=llava_hf", simple=True).base_class is LlavaHf
    assert read("base=test_batched").base_class is bases.Batched


@pytest.mark.parametrize("text", ["base=llava_hf", "base=llava_hf,method=none"])
def test_no_method_is_the_unpruned_model(text: str) -> None:
    read_ = read(text)
    assert read_.method is None
    assert read_.description == "unpruned"


def test_options_can_be_lists_and_fractions() -> None:
    method = read("base=llava_hf,method=transprune,keep=[0.5,0.25],prune_before=[2,3],"
                  "transition_layers=[0,1,2]").method  # fmt: skip
    assert method == tokprune.TransPrune(
        keep=(0.5, 0.25), prune_before=(2, 3), transition_layers=(0, 1, 2)
    )


def test_name_of_both_must_say_which() -> None:
    with pytest.raises(ValueError, match=r"'keep'.*write option\.keep=… or base\.keep=…"):
        read("base=test_batched,pretrained=x,method=todre,keep=64")
    read_ = read("base=test_batched,pretrained=x,method=todre,option.keep=64,base.keep=some")
    assert read_.method == tokprune.ToDRE(keep=64)
    assert read_.passed == {"pretrained": "x", "keep": "some"}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("pretrained=x", "base is missing"),
        ("base=llava_fh", "base='llava_fh' should be an lmms-eval model.*Did you mean 'llava_hf'"),
        ("base=tokprune", "base='tokprune' should be"),
        ("base=llava_hf,keep", "should be name=value pairs"),
        ("base=llava_hf,method=todr,keep=64", "'todr' is unknown.*Did you mean 'todre'"),
        ("base=llava_hf,method=todre", "'keep' is required by todre"),
        ("base=llava_hf,method=todre,keep=-3", "keep=-3 should be"),
        ("base=llava_hf,method=todre,kep=64", "'kep' is unknown to tokprune.*Did you mean 'keep'"),
        ("base=llava_hf,method=todre,keep=64,option.no=1", "'no' is unknown to todre"),
        ("base=llava_hf,keep=64", "'keep' belongs to a method"),
        ("base=llava_hf,option.keep=64", "'keep' belongs to a method"),
        ("base=llava_hf,dtyp=float32", "'dtyp' is unknown.*Did you mean 'dtype'"),
        ("base=test_batched,zzz=1", "'zzz' is unknown to tokprune .* and to test_batched"),
        ("base=llava_hf,control=none", "control='none' should be one of blind, downsample"),
        ("base=llava_hf,control=downsample", "factor=None should be a number from 1"),
        ("base=llava_hf,control=downsample,factor=0.5", "factor=0.5 should be a number from 1"),
        ("base=llava_hf,control=blind,factor=2", "control=downsample is not"),
        ("base=llava_hf,control=blind,method=todre,keep=64", "either control or a method"),
        ("base=llava_hf,setting_sha=00", "setting_sha is given, but setting is not"),
        ("base=llava_hf,setting=x,method=todre", "method or setting, not both"),
    ],
)
def test_wrong_arguments_are_named(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        read(text)


# ------------------------------------------------------------------------------- settings


def written(path: Path, content: Any) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return f"base=llava_hf,setting={path},setting_sha={sha(path)}"


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_setting_names_method_and_options(tmp_path: Path) -> None:
    setting = {"method": "todre", "options": {"keep": 64, "tau": 0.2}}
    expected = tokprune.ToDRE(keep=64, tau=0.2)
    assert read(written(tmp_path / "s.json", setting)).method == expected
    assert read(written(tmp_path / "s.json", {"schema": 1, **setting})).method == expected
    nothing = {"method": None, "options": {}}
    assert read(written(tmp_path / "s.json", nothing)).method is None


def test_setting_needs_the_hash_of_its_content(tmp_path: Path) -> None:
    text = written(tmp_path / "s.json", {"method": "todre", "options": {"keep": 64}})
    with pytest.raises(ValueError, match=f"needs setting_sha={sha(tmp_path / 's.json')}"):
        read(text.split(",setting_sha")[0])
    (tmp_path / "s.json").write_text("{}")
    with pytest.raises(ValueError, match="is not that of setting="):
        read(text)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "not valid JSON"),
        ("[]", "should hold a JSON object"),
        ({"options": {}}, "'method'=None should be"),
        ({"method": None, "options": {"keep": 1}}, "'method' is null"),
        ({"method": "nope", "options": {}}, "'nope' is unknown"),
        ({"schema": 7, "method": "todre", "options": {"keep": 64}}, "schema=7 is unknown"),
    ],
)
def test_bad_settings_are_refused(tmp_path: Path, content: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        read(written(tmp_path / "s.json", content))


def test_missing_setting() -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        read("base=llava_hf,setting=nowhere.json,setting_sha=00")


# ------------------------------------------------------------------------- before weights


def test_misfits_are_refused_before_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loading(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were about to be read")

    monkeypatch.setattr(LlavaHf, "__init__", loading)
    with pytest.raises(AssertionError, match="weights"):
        TokpruneChat.create_from_arg_string("base=llava_hf,pretrained=mini,method=todre,keep=9")
    with pytest.raises(ValueError, match="keep=1000 is larger than the 576 visual tokens"):
        TokpruneChat.create_from_arg_string("base=llava_hf,pretrained=mini,method=todre,keep=1000")
    GPT2Config(architectures=["GPT2LMHeadModel"]).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="GPT2LMHeadModel is not supported; known"):
        TokpruneChat.create_from_arg_string(f"base=llava_hf,pretrained={tmp_path}")


def test_wrapped_class_without_a_model_is_refused() -> None:
    class Remote(bases.Batched):
        def __init__(self) -> None:
            super(bases.Batched, self).__init__()

    from tokprune.integrations.lmms_eval.model import make

    with pytest.raises(UnsupportedModelError, match=r"base=remote: .*it holds no PyTorch model"):
        make(Arguments("remote", Remote))


def test_model_is_found_behind_wrappers() -> None:
    model = tiny.llava()

    class Holder:
        device = "cpu"

        def __init__(self, module: Any) -> None:
            self.inner = module

    wrapped = torch.nn.DataParallel(model)
    assert find_model(Holder(wrapped), "x") is model
    other = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9))
    with pytest.raises(UnsupportedModelError, match=r"found GPT2LMHeadModel, GPT2Model\)"):
        find_model(Holder(other), "x")
