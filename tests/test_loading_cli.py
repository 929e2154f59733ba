"""Loading a patched model from a folder, and the command line as installed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_processor
import torch
from pictures import landscape
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel

import tokprune
from tokprune import loading
from tokprune.cli import BadInput, app, parse_keep, parse_options

PROMPT = "what is in the picture ?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two model folders with processors, one without chat template, and an image."""
    root = tmp_path_factory.mktemp("models")
    tiny_processor.save(root / "llava")
    tiny_processor.save(root / "llava_next", "llava_next")
    tiny_processor.save(root / "plain", chat=False)
    landscape().save(root / "photo.png")
    return root


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to read weights fails."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", refuse)


# -------------------------------------------------------------------------- loading


@pytest.mark.parametrize("family", tiny.BUILDERS)
def test_load_patches_and_equals_patching_by_hand(folder: Path, family: str) -> None:
    model, processor = tokprune.load(
        folder / family, "random", keep=9, processor=True, dtype="float32"
    )
    assert type(model) is type(tiny.BUILDERS[family]())
    assert tokprune.is_patched(model)
    assert not model.training
    inputs = processor(images=landscape(), text=f"user : <image> {PROMPT}", return_tensors="pt")
    with torch.no_grad():
        ours = model(**inputs).logits
        by_hand = tiny.BUILDERS[family]()
        tokprune.patch(by_hand, tokprune.Random(keep=9))
        assert torch.equal(ours, by_hand(**inputs).logits)
    trace = tokprune.trace_of(model)
    assert trace is not None
    assert len(trace.kept()) == 9


def test_options_reach_the_model_and_the_method(folder: Path) -> None:
    model = tokprune.load(
        str(folder / "llava"), tokprune.FastV(keep=5), prune_before=3,
        dtype=torch.bfloat16, attn_implementation="eager",
    )  # fmt: skip
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    trace = tokprune.trace_of(model)
    assert trace is not None
    assert trace.method == repr(tokprune.FastV(keep=5, prune_before=3, positions="preserve"))


def test_load_without_method(folder: Path) -> None:
    model = tokprune.load(folder / "llava")
    assert not tokprune.is_patched(model)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("nope", {}, "method='nope' is unknown"),
        ("random", {}, "'keep' is required"),
        ("random", {"keep": 0}, "keep=0"),
        ("random", {"keep": 99}, "larger than the 36"),
        ("fastv", {"keep": 4, "prune_before": 8}, "prune_before=8"),
        ("random", {"keep": 4, "sed": 1}, "Did you mean 'seed'"),
        (None, {"keep": 4}, "'keep' belongs to a method"),
        ("random", {"keep": 4, "use_safetensors": False}, "safetensors only"),
        ("random", {"keep": 4, "attn_implementation": "flex_attention"}, "flex_attention"),
        (tokprune.Random(keep=4), {"kep": 2}, "Did you mean 'keep'"),
    ],
)
def test_bad_options_fail_before_weights(
    folder: Path, method: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, tokprune.UnsupportedModelError), match=message):
        tokprune.load(folder / "llava", method, **options)


@pytest.mark.usefixtures("no_weights")
def test_ambiguous_option(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_LOADER", loading._LOADER | {"seed"})
    with pytest.raises(ValueError, match="'seed' is known to random and to from_pretrained"):
        tokprune.load(folder / "llava", "random", keep=4, seed=1)


def test_unsupported_checkpoint_names_the_supported(tmp_path: Path) -> None:
    CLIPVisionModel(CLIPVisionConfig(**tiny.vision_config().to_dict())).save_pretrained(tmp_path)
    with pytest.raises(tokprune.UnsupportedModelError, match="LlavaForConditionalGeneration"):
        tokprune.load(tmp_path, "random", keep=4)


def test_class_from_model_type_alone(folder: Path, tmp_path: Path) -> None:
    for file in (folder / "llava_next").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    del config["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert type(tokprune.load(tmp_path)).__name__ == "LlavaNextForConditionalGeneration"


def test_only_safetensors(tmp_path: Path) -> None:
    model = tiny.llava()
    model.config.architectures = ["LlavaForConditionalGeneration"]
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        tokprune.load(tmp_path)


def test_names_of_the_package() -> None:
    for name in tokprune.__all__:
        assert getattr(tokprune, name) is not None
    assert {"load", "overlay", "Trace", "compress", "Random"} <= set(tokprune.__all__)
    assert callable(tokprune.overlay)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        tokprune.nonsense  # noqa: B018


# --------------------------------------------------------------------- command line


def cli(*args: Any) -> subprocess.CompletedProcess[str]:
    script = Path(sys.executable).with_name("tokprune")
    return subprocess.run(
        [script, *map(str, args)], capture_output=True, text=True, timeout=300, check=False
    )


def ran(*args: Any) -> str:
    done = cli(*args)
    assert done.returncode == 0, done.stderr
    return done.stdout


def one_line(code: Any, out: str, err: str) -> str:
    assert (code, out) == (2, ""), err
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("Error: ")
    return lines[0]


@pytest.fixture
def inside(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the command in this process (importing torch takes seconds) and gives its output."""

    def call(*args: Any) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            app([*map(str, args)])
        out, err = capsys.readouterr()
        assert caught.value.code == 0, err
        return out

    return call


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The same for a command that is to fail: gives its error line."""

    def call(*args: Any) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            app([*map(str, args)])
        return one_line(caught.value.code, *capsys.readouterr())

    return call


def test_version_and_help_import_no_torch() -> None:
    assert ran("--version") == f"tokprune {tokprune.__version__}\n"
    text = ran("--help")
    assert "methods" in text
    assert "run" in text
    code = (
        "import sys, tokprune.cli\n"
        "try: tokprune.cli.app(['run', '--help'])\n"
        "except SystemExit as e: assert not e.code\n"
        "assert not {'torch', 'transformers', 'PIL'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    module = [sys.executable, "-m", "tokprune", "--version"]
    assert subprocess.run(module, check=True, capture_output=True, text=True).stdout == ran(
        "--version"
    )


def test_methods_table_and_json(inside: Callable[..., str]) -> None:
    entries = json.loads(ran("methods", "--json"))
    names = [e["name"] for e in entries]
    assert names == sorted(names)
    assert {"random", "fastv"} <= set(names)
    (fastv,) = json.loads(inside("methods", "FASTV*", "--json"))
    assert fastv["options"]["prune_before"] == 2
    assert fastv["presets"][0]["model"] == "llava-1.5"
    table = inside("methods", "*v")
    assert "decoder prefill" in table
    assert "arXiv 2403.06764" in table
    assert "random" not in table
    done = cli("methods", "zzz")
    assert "no method matches 'zzz'" in one_line(done.returncode, done.stdout, done.stderr)


def test_run_shows_answer_and_summary(folder: Path, tmp_path: Path) -> None:
    image = tmp_path / "kept.png"
    text = ran(
        "run", "--model", folder / "llava", "--method", "random", "--keep", 12, "--option",
        "seed=3", "--image", folder / "photo.png", "--prompt", PROMPT, "--max-new-tokens", 6,
        "--device", "cpu", "--dtype", "float32", "--overlay", image, "--compare",
    )  # fmt: skip
    assert "Random(keep=12, " in text
    assert "seed=3)" in text
    assert "36 -> 12 (33.3 %)" in text
    assert "unpruned: " in text
    with Image.open(image) as saved:
        assert saved.width > 800
    # the same by hand
    model, processor = tokprune.load(folder / "llava", processor=True)
    prompt = f"user : <image>\n{PROMPT} assistant :"
    inputs = processor(images=landscape(), text=prompt, return_tensors="pt")
    answers = []
    for method in (None, tokprune.Random(keep=12, seed=3)):
        if method is not None:
            tokprune.patch(model, method)
        new = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        new = new[0, inputs["input_ids"].shape[1] :]
        answers.append(processor.decode(new, skip_special_tokens=True))
    assert answers[0] != answers[1]
    assert text.startswith(f"unpruned: {answers[0]}\npruned:   {answers[1]}\n")


def test_run_json_tiles_and_two_images(folder: Path, inside: Callable[..., str]) -> None:
    entry = json.loads(
        inside(
            "run", "--model", folder / "llava_next", "--method", "fastv", "--keep", 0.1,
            "--image", folder / "photo.png", "--image", folder / "photo.png",
            "--prompt", PROMPT, "--max-new-tokens", 4, "--json",
        )
    )  # fmt: skip
    assert entry["method"].startswith("FastV(keep=0.1")
    assert len(entry["trace"]["images"]) == 2
    assert entry["trace"]["images"][0]["tiles"] > 1
    assert entry["trace"]["visual_tokens_out"][0] < 0.11 * entry["trace"]["visual_tokens_in"][0]


def test_run_without_template_without_image_without_method(
    folder: Path, inside: Callable[..., str]
) -> None:
    base = ("run", "--model", folder / "plain", "--prompt", PROMPT, "--max-new-tokens", 4)
    with_image = json.loads(inside(*base, "--image", folder / "photo.png", "--json"))
    assert with_image["trace"] is None
    text = inside(*base, "--method", "random", "--keep", 5)
    assert "No prefill with images was recorded" in text
    pruned = inside(*base, "--method", "random", "--keep", 5, "--image", folder / "photo.png")
    assert "36 -> 5" in pruned


def test_bad_input_is_one_line(folder: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    base = ("run", "--model", folder / "llava", "--prompt", "x")
    method = (*base, "--method", "random", "--keep", 4)
    not_an_image = tmp_path / "text.png"
    not_an_image.write_text("hello")
    photo = folder / "photo.png"
    assert "Missing option '--prompt'" in refused("run", "--model", folder / "llava")
    assert "'bogus'" in refused("bogus")
    assert "--keep 'x'" in refused(*base, "--method", "random", "--keep", "x")
    assert "needs --method" in refused(*base, "--keep", 4)
    assert "method='nope'" in refused(*base, "--method", "nope")
    assert "name=value" in refused(*method, "--option", "seed")
    assert "unknown to random" in refused(*method, "--option", "tau=1")
    assert "budget once" in refused(*method, "--option", "keep=3")
    assert "no such file" in refused(*method, "--image", tmp_path / "none.png")
    assert "not an image" in refused(*method, "--image", not_an_image)
    assert "no such folder" in refused(
        "run", "--model", tmp_path / "none", "--prompt", "x", "--method", "random", "--keep", 4
    )
    assert "image format" in refused(*method, "--image", photo, "--overlay", tmp_path / "k.abc")
    assert "needs an --image" in refused(*method, "--overlay", tmp_path / "k.png")
    assert "schedule" in refused(*base, "--method", "random", "--keep", "3,,4")
    done = cli(*base, "--method", "random", "--keep", 37)
    assert "larger than the 36" in one_line(done.returncode, done.stdout, done.stderr)
    if not torch.cuda.is_available():
        assert "no CUDA device" in refused(*method, "--device", "cuda")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("64", 64),
        ("0.11", 0.11),
        ("1.0", 1.0),
        ("0.875, 0.625,0.125", (0.875, 0.625, 0.125)),
        ("300,0.5", (300, 0.5)),
    ],
)
def test_keep_forms(text: str, value: Any) -> None:
    parsed = parse_keep(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_option_forms() -> None:
    given = ["a=1", "b=0.5", "c=last", "d=(1, 2)", "e=None", "f='x'", "g-h=True", "i=a=b"]
    assert parse_options(given) == {
        "a": 1, "b": 0.5, "c": "last", "d": (1, 2), "e": None, "f": "x", "g_h": True, "i": "a=b",
    }  # fmt: skip
    with pytest.raises(BadInput, match="twice"):
        parse_options(["a=1", "a=2"])
