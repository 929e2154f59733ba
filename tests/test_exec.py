"""What ``tokprune exec`` does inside a process, and ``patch_on_load``: models patched as they are
loaded, and counted. (Whole commands: test_exec_commands.py.)"""

from __future__ import annotations

import copy
import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny
import tiny_processor
import torch
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration, PreTrainedModel

import tokprune
from tokprune.integrations.exec.imports import AfterImport
from tokprune.integrations.exec.journal import Journal
from tokprune.integrations.exec.verdict import ModelCount, Verdict
from tokprune.integrations.exec.watch import Prompts, watch_text
from tokprune.methods import FastV, Grid, Random
from tokprune.testing import tiny_family


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_processor.save(tmp_path_factory.mktemp("models") / "llava")


# ------------------------------------------------------------------------- after an import


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a module that has not been imported."""
    (tmp_path / "some_module_of_mine.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "some_module_of_mine", raising=False)
    return "some_module_of_mine"


def test_acts_once_a_module_has_run(written: str) -> None:
    seen: list[ModuleType] = []
    finders = list(sys.meta_path)
    AfterImport(written, lambda module: seen.append(module.value))
    assert importlib.util.find_spec(written) is not None  # looked for, not imported
    assert not seen
    module = importlib.import_module(written)
    assert seen == [1]
    assert sys.meta_path == finders
    assert module.__spec__ is not None
    AfterImport(written, lambda module: seen.append(module.value + 1))
    assert seen == [1, 2]


def test_does_not_act_when_cancelled(written: str) -> None:
    seen: list[Any] = []
    waiting = AfterImport(written, seen.append)
    assert importlib.util.find_spec(written) is not None
    waiting.cancel()
    importlib.import_module(written)
    assert not seen


# ------------------------------------------------------------------------- in one process


def test_patch_on_load(folder: Path) -> None:
    original = PreTrainedModel.__dict__["from_pretrained"]
    with tokprune.patch_on_load("grid", keep=4) as traces:
        first = AutoModelForImageTextToText.from_pretrained(folder)
        second, info = LlavaForConditionalGeneration.from_pretrained(
            folder, output_loading_info=True
        )
    assert PreTrainedModel.__dict__["from_pretrained"] is original
    assert info["missing_keys"] in ([], set())
    assert [tokprune.trace_of(model) for model in (first, second)] == traces
    first(**tiny.make_inputs(first, [[3, "image", 4]]))
    assert traces[0].last is not None
    assert sum(traces[0].last.layers[-1].counts[0]) == 4
    later = LlavaForConditionalGeneration.from_pretrained(folder)
    assert not tokprune.is_patched(later)


def test_patch_on_load_leaves_other_classes_alone(folder: Path, tmp_path: Path) -> None:
    tiny.llava().model.language_model.save_pretrained(tmp_path / "text")
    cls = type(tiny.llava().model.language_model)
    with tokprune.patch_on_load("grid", keep=4) as traces:
        cls.from_pretrained(tmp_path / "text")
    assert not traces


def test_patch_on_load_says_what_is_wrong(folder: Path) -> None:
    original = PreTrainedModel.__dict__["from_pretrained"]
    with pytest.raises(ValueError, match="Did you mean 'grid'"):
        with tokprune.patch_on_load("gird", keep=4):
            raise AssertionError
    with pytest.raises(ValueError, match="prune_before"):
        with tokprune.patch_on_load(FastV(keep=4, prune_before=99)):
            LlavaForConditionalGeneration.from_pretrained(folder)
    assert PreTrainedModel.__dict__["from_pretrained"] is original


# ------------------------------------------------------------------------- what is counted


@pytest.mark.parametrize("family", ["llava-1.5", "qwen2.5-vl", "gemma3"])
def test_counts_prompts_without_images(family: str) -> None:
    made = tiny_family(family)
    model = made.build(attention="sdpa")
    trace = tokprune.patch(model, "grid", keep=4)
    asked: list[tuple[str, int]] = []
    watch_text(model, lambda *told: asked.append(told))
    inputs = made.inputs(model, [[3, "image", 4]])
    text = torch.full((2, 5), 7)
    model.generate(input_ids=text, max_new_tokens=3, do_sample=False)
    assert asked == [("text", 2)]
    model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert asked.pop() == ("text", 2)
    assert not asked
    assert trace.prefills == 1
    parts = model.model
    embeds = parts.get_input_embeddings()(text)
    parts.language_model(inputs_embeds=embeds)
    assert asked.pop() == ("beside", 2)
    parts.language_model(input_ids=text)
    assert asked.pop() == ("text", 2)
    twin = copy.deepcopy(model)
    twin.model.language_model(inputs_embeds=embeds)
    assert asked.pop() == ("beside", 2)
    with pytest.raises(ValueError, match="works before the decoder"):
        model(inputs_embeds=embeds)
    model(**inputs)
    assert not asked  # an error leaves nothing behind
    tokprune.unpatch(model)
    model(**inputs)
    assert asked.pop() == ("unpatched", 1)


def test_numbers_of_a_prefill() -> None:
    model = tiny.llava()
    trace = tokprune.patch(model, "fastv", keep=4, prune_before=4)
    told: list[Prompts] = []
    tokprune.Trace.observers.append(lambda trace: told.append(Prompts.of(trace)))
    try:
        model(**tiny.make_inputs(model, [[3, "image", "image", 4], [9], [2, "image", 1]]))
    finally:
        tokprune.Trace.observers.pop()
    full = tiny.PATCHES
    assert trace.prefills == 1
    [prompts] = told
    assert (prompts.prompts, prompts.reduced) == (2, 2)
    assert (prompts.before, prompts.after) == (3 * full, 12)
    assert prompts.mean == pytest.approx((3 * full * 4 + 12 * 4) / 8)


@pytest.mark.parametrize("method", [Random(keep=1.0), Grid(keep=tiny.PATCHES)])
def test_a_prefill_of_which_nothing_is_removed(method: tokprune.methods.Method) -> None:
    model = tiny.llava()
    trace = tokprune.patch(model, method)
    model(**tiny.make_inputs(model, [[3, "image", 4]]))
    assert Prompts.of(trace).reduced == 0


# ------------------------------------------------------------------------- the verdict

LOADED = {"event": "loaded", "process": 1, "number": 1, "model": "Llava", "method": "Grid(keep=4)"}
PREFILL = {
    **LOADED, "event": "prefill", "prompts": 2, "reduced": 2, "before": 32,
    "after": 8, "mean": 8.0,
}  # fmt: skip
TEXT = {**LOADED, "event": "asked", "kind": "text", "prompts": 3}


@pytest.mark.parametrize(
    ("events", "problem"),
    [
        ([], "no supported model was loaded by from_pretrained"),
        (
            [{"event": "absent", "process": 1, "python": "other/python", "reason": "No module"}],
            "tokprune is not installed for other/python (No module)",
        ),
        ([LOADED], "no prompt reached a patched model"),
        ([LOADED, TEXT], "Llava answered, and no prompt had an image"),
        ([LOADED, PREFILL, {**TEXT, "kind": "beside"}], "as embeddings, past the patch"),
        ([LOADED, PREFILL, {**TEXT, "kind": "unpatched"}], "had taken the patch off"),
        ([LOADED, {**PREFILL, "reduced": 0}], "Llava kept every token of every image"),
        (
            [LOADED, PREFILL, {"event": "failed", "model": "Qwen", "reason": "ValueError: no"}],
            "Qwen could not be patched: ValueError: no",
        ),
        # one of two models
        (
            [LOADED, PREFILL, {**TEXT, "number": 2, "model": "Qwen"}],
            "Qwen answered, and no prompt had an image",
        ),
    ],
)
def test_problems(events: list[dict[str, Any]], problem: str) -> None:
    [found] = Verdict.of(events).problems
    assert problem in found


def test_numbers_add_up_over_processes() -> None:
    forked = {**PREFILL, "process": 3}  # goes on with its parent's model
    second = {**LOADED, "process": 2}
    idle = {**LOADED, "process": 4}
    verdict = Verdict.of([LOADED, PREFILL, TEXT, second, {**PREFILL, "process": 2}, forked, idle])
    assert not verdict.problems
    assert verdict.models == [
        ModelCount(
            "Llava", "Grid(keep=4)", loaded=3, idle=1, prompts=6, reduced=6, before=96, after=24,
            mean=24.0, text=3,
        )
    ]  # fmt: skip


def test_refused_classes_are_a_note() -> None:
    event = {"event": "refused", "model": "Idefics", "reason": "cross-attention"}
    verdict = Verdict.of([LOADED, PREFILL, event])
    assert not verdict.problems
    assert verdict.notes == ["Idefics was left as it is: cross-attention"]


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.write("loaded", number=1)
    journal.write("asked", kind="text")
    [path] = tmp_path.glob("*.jsonl")
    path.write_bytes(path.read_bytes()[:-5])
    assert [event["event"] for event in journal.read()] == ["loaded"]
    journal = Journal(tmp_path / "gone")
    journal.write("loaded", number=1)  # nowhere to write: the script goes on
    assert journal.read() == []
