"""Checkpoints that others made: no code of theirs runs, nothing is unpickled, no file outside their
folder is opened, and what is broken is named in one sentence."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_processor
import torch
from pictures import landscape
from safetensors.torch import load_file, save_file

import tokprune
from tokprune.checkpoint import check_no_code
from tokprune.cli import app
from tokprune.eval.sweep.loaded_model import LoadedModel

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("doors")
    return tiny_processor.save(root / "sound")


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(sound, tmp_path / "model"))


@pytest.fixture
def refused(sound: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command in this process that is to fail, and gives its error line."""

    def call(*args: Any) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            app([*map(str, args)])
        out, err = capsys.readouterr()
        assert (ended.value.code, out) == (2, ""), err
        (line,) = err.strip().splitlines()
        assert line.startswith("Error: ")
        return line

    return call


def asked(folder: Path, *more: Any) -> tuple[Any, ...]:
    return ("run", "--model", folder, "--prompt", "what ?", "--method", "random", "--keep", 4,
            "--max-new-tokens", 2, *more)  # fmt: skip


def change(path: Path, **changes: Any) -> None:
    value = json.loads(path.read_text())
    path.write_text(json.dumps(value | changes))


def shard(folder: Path) -> dict[str, str]:
    """Weights in two files with an index; gives its ``weight_map``."""
    weights = load_file(folder / WEIGHTS)
    names = sorted(weights)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in files.items():
        save_file({name: weights[name] for name in own}, folder / file, {"format": "pt"})
    (folder / WEIGHTS).unlink()
    index = {name: file for file, own in files.items() for name in own}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return index


# ------------------------------------------------------------------------- remote code


def hostile(folder: Path, kind: str) -> Path:
    """Let a config ask for code that leaves a mark; gives the mark's path."""
    mark = folder / "code-has-run"
    code = f"open({str(mark)!r}, 'w').close()\nclass Mine: pass\ndef generate(*a, **k): pass\n"
    (folder / "mine.py").write_text(code)
    if kind == "generate":
        (folder / "custom_generate").mkdir()
        (folder / "custom_generate" / "generate.py").write_text(code)
        return mark
    file, auto = {
        "model": ("config.json", "AutoConfig"),
        "other model": ("config.json", "AutoConfig"),
        "tokenizer": ("tokenizer_config.json", "AutoTokenizer"),
        "processor": ("processor_config.json", "AutoProcessor"),
        "images": ("preprocessor_config.json", "AutoImageProcessor"),
    }[kind]
    if not (folder / file).exists():
        (folder / file).write_text("{}")
    change(folder / file, auto_map={auto: "mine.Mine" if auto != "AutoTokenizer" else
                                    ["mine.Mine", "mine.Mine"]})  # fmt: skip
    if kind == "other model":
        change(folder / file, model_type="mine")
    if kind == "tokenizer":
        change(folder / file, tokenizer_class="Mine")
    return mark


@pytest.mark.parametrize(
    "kind", ["model", "other model", "tokenizer", "processor", "images", "generate"]
)
def test_no_code_runs_and_nobody_is_asked(
    folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = hostile(folder, kind)
    questions: list[str] = []
    monkeypatch.setattr("builtins.input", lambda text="": questions.append(text) or "y")
    for load in (
        lambda: tokprune.load(folder, processor=True),
        lambda: LoadedModel.load(str(folder)),
    ):
        try:
            load()
        except (ValueError, OSError) as error:
            assert "trust_remote_code" in str(error) or "damaged" in str(error)  # noqa: PT017
    assert not questions
    assert not mark.exists()


def test_installed_command_at_a_terminal_asks_nothing(folder: Path) -> None:
    mark = hostile(folder, "other model")
    script = Path(sys.executable).with_name("tokprune")
    code = (
        "import os, pty, sys\n"
        f"args = [{str(script)!r}, 'methods', '--model', {str(folder)!r}]\n"
        "pid, fd = pty.fork()\n"
        "if not pid: os.execv(args[0], args)\n"
        "os.write(fd, b'y\\ny\\n')\n"
        "out = b''\n"
        "try:\n"
        "    while part := os.read(fd, 4096): out += part\n"
        "except OSError: pass\n"
        "sys.stdout.write(out.decode()); sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 2, done.stdout
    assert "Error: " in done.stdout
    assert "auto_map" in done.stdout
    assert "[y/N]" not in done.stdout
    assert not mark.exists()


def test_the_option_lets_code_run(folder: Path) -> None:
    mark = hostile(folder, "other model")
    with pytest.raises((ValueError, OSError, AttributeError)):
        tokprune.load(folder, trust_remote_code=True)
    assert mark.exists()


def test_kernels_of_the_hub_are_code(folder: Path, refused: Callable[..., str]) -> None:
    if tokprune.engine.compat.RELEASE < (5, 0):
        pytest.skip("transformers 4 does not take the backend from config.json")
    change(folder / "config.json", attn_implementation="some/kernel")
    assert "config.json asks for attn_implementation='some/kernel'" in refused(*asked(folder))


def test_loaders_that_would_ask_refuse_maps(folder: Path) -> None:
    check_no_code(str(folder), mapped=True)
    hostile(folder, "tokenizer")
    with pytest.raises(OSError, match=r"tokenizer_config.json asks for code of its own"):
        check_no_code(str(folder), mapped=True)


# ----------------------------------------------------------------------------- weights


def test_shards_and_snapshots_of_the_hub_load(folder: Path, tmp_path: Path) -> None:
    shard(folder)
    whole = tokprune.load(folder).state_dict()
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, blobs / f"{number:064x}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{number:064x}")
    (tmp_path / "link").symlink_to(snapshot)
    for place in (snapshot, tmp_path / "link"):
        linked = tokprune.load(place).state_dict()
        assert all(torch.equal(whole[name], linked[name]) for name in whole)


def test_no_pickle_and_nothing_outside(
    folder: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    index = shard(folder)
    outside = Path(shutil.copy(folder / "a.safetensors", tmp_path / "x.safetensors"))
    torch.save(load_file(folder / "a.safetensors"), folder / "pytorch_model.bin")
    (folder / "linked.safetensors").symlink_to(outside)
    for name, said in (
        ("pytorch_model.bin", "is no safetensors file"),
        ("../x.safetensors", "lies outside the folder"),
        (str(outside), "lies outside the folder"),
        ("linked.safetensors", "is a link to"),
        ("gone.safetensors", "gone.safetensors is missing"),
    ):
        named = {key: name if file == "a.safetensors" else file for key, file in index.items()}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": named}))
        line = refused(*asked(folder))
        assert said in line
        assert Path(name).name in line
    for broken in ({}, {"weight_map": []}, {"weight_map": {}}):
        (folder / INDEX).write_text(json.dumps(broken))
        assert f"{INDEX}: 'weight_map' should say" in refused(*asked(folder))
    (folder / INDEX).unlink()
    (folder / WEIGHTS).symlink_to(outside)
    assert f"{WEIGHTS} is a link to" in refused(*asked(folder))


def test_only_pickles_are_refused(folder: Path, refused: Callable[..., str]) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    assert WEIGHTS in refused(*asked(folder))


def test_weights_that_lack_some_are_refused(folder: Path, refused: Callable[..., str]) -> None:
    weights = load_file(folder / WEIGHTS)
    weights.pop(next(name for name in weights if "down_proj" in name))
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    line = refused(*asked(folder))
    assert "weights lack 1 that the model has" in line
    assert "down_proj" in line


# ------------------------------------------------------------------------ broken files


@pytest.mark.parametrize("content", [DEEP, '{"a": ', "", b"\xff\xfe\0", "null", "[1]"])
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "processor_config.json", "tokenizer.json",
             "tokenizer_config.json"]
)  # fmt: skip
def test_broken_json_is_named(
    folder: Path, name: str, content: str | bytes, refused: Callable[..., str]
) -> None:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    line = refused(*asked(folder))
    assert f"model {folder}" in line
    assert name in line


@pytest.mark.parametrize("size", [0, 4, 100, 5000])
def test_cut_off_weights_are_named(folder: Path, size: int, refused: Callable[..., str]) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:size])
    assert f"model {folder}: {WEIGHTS} is damaged or cut off" in refused(*asked(folder))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "nope", "architectures": None}, "nope"),
        ({"model_type": 3}, "model_type=3"),
        ({"architectures": ["Nope"]}, "checkpoint of class Nope is not supported"),
        ({"architectures": 3}, "checkpoint of class 3 is not supported"),
        ({"text_config": "x"}, "config.json"),
        ({"vision_feature_layer": 99}, "vision_feature_layer=99 should lie between"),
    ],
)
def test_configs_that_make_no_model(
    folder: Path, changes: dict[str, Any], said: str, refused: Callable[..., str]
) -> None:
    change(folder / "config.json", **changes)
    assert said in refused(*asked(folder))


def test_what_is_no_model_folder(tmp_path: Path, folder: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "empty").mkdir()
    commands = (
        lambda name: asked(name),
        lambda name: ("bench", "--model", name, "--methods", "random", "--keep", 4),
        lambda name: ("methods", "--model", name),
        lambda name: ("sweep", "--model", name, "--out", tmp_path / "out", "--limit", 1),
    )
    for command in commands:
        assert "holds no config.json" in refused(*command(tmp_path / "empty"))
        assert "is a file; it should be" in refused(*command(folder / "config.json"))
        assert "no such folder" in refused(*command(tmp_path / "none"))
        assert not (tmp_path / "out").exists()
    landscape().save(tmp_path / "photo.png")
    for name in ("tokenizer.json", "processor_config.json"):
        saved = (folder / name).read_bytes()
        (folder / name).unlink()
        line = refused(*asked(folder, "--image", tmp_path / "photo.png"))
        assert f"model {folder}" in line or "should be those of the model" in line
        (folder / name).write_bytes(saved)


def test_a_config_that_lost_a_part_is_refused_before_memory_is_spent(
    folder: Path, refused: Callable[..., str]
) -> None:
    change(folder / "config.json", text_config=None)  # a Llama of 7 billion weights is the default
    assert "config.json describes a model of " in refused(*asked(folder))


@pytest.mark.parametrize("size", ["bigger", "smaller"])
def test_weights_of_other_shapes(folder: Path, size: str, refused: Callable[..., str]) -> None:
    told = json.loads((folder / "config.json").read_text())
    told["text_config"]["intermediate_size"] *= 2
    (folder / "config.json").write_text(json.dumps(told))
    if size == "smaller":
        os.truncate(folder / WEIGHTS, 50)
        assert "damaged" in refused(*asked(folder))
    else:
        assert "other shapes than config.json says" in refused(*asked(folder))


def test_settings_nested_too_deeply(tmp_path: Path, refused: Callable[..., str]) -> None:
    path = tmp_path / "setting.json"
    path.write_text(DEEP)
    line = refused("run", "--model", "mini", "--prompt", "x", "--setting", path)
    assert f"setting {path}: not valid JSON (nested too deeply)" in line
