"""Ask second questions with the settings of a finished sweep, image by image; resumable."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from tokprune.eval.benchmarks.base import Item
from tokprune.eval.second_question.asking import Answered, History, Prompts, ask_image
from tokprune.eval.second_question.measures import HEADER_FILE, ROWS_FILE
from tokprune.eval.sweep.builtin import BuiltinHarness, sharing
from tokprune.eval.sweep.identity import code_hash, runtime
from tokprune.eval.sweep.loaded_model import LoadedModel
from tokprune.eval.sweep.results import Run, read_run
from tokprune.eval.sweep.settings import make_settings
from tokprune.eval.sweep.trials import Trial
from tokprune.files import parse_json, read_object
from tokprune.methods.base import Method

#: questions of an image that are paired with one another
_MOST = 4


def ask_second_questions(
    folder: str | Path,
    *,
    pairs: int = 600,
    history: History = "none",
    trials: Sequence[str] | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> list[str]:
    """Ask ordered pairs of questions about the same image, with the trials of a run, and write the
    answers into its folder (``second_question.jsonl``). Stopped and started again, it goes on.

    Args:
        folder: run folder of ``tokprune sweep``, with the builtin harness.
        pairs: how many at least, as far as the benchmark has them: of images drawn at random, all
            ordered pairs of up to four questions.
        history: what a second question comes after: the image alone ("none"), or the image, the
            first question, and the unpruned model's answer ("own").
        trials: of the run; None: all that have a method and are results.
        seed: of the draw of images.
        progress: called with (images done, images).

    Returns:
        Names of the trials that were asked.

    Raises:
        ValueError: no such trial, no image with two questions, a run of another harness, or a file
            of other settings in the folder.
        OSError: the run, its model or its benchmark cannot be read.
    """
    run = read_run(folder)
    if "harness" in run.info:
        raise ValueError(
            f"run folder {run.folder}: was asked by {run.info['harness'].get('name')}; second "
            "questions are asked by the builtin harness only"
        )
    chosen = _trials(run, trials)
    stored = {**run.info["settings"], "out": str(run.folder), "fresh": False}
    settings = make_settings(stored, str(run.folder / "run.json"))
    harness = BuiltinHarness.open(settings)
    groups = draw_groups(harness.items, pairs, seed)
    if not groups:
        raise ValueError(
            f"benchmark {harness.benchmark.name}: no image has two questions, so there is no "
            "second one"
        )
    loaded = LoadedModel.load(
        settings.model, settings.dtype, settings.device, settings.trust_remote_code
    )
    header = {
        "schema": 1, "history": history, "seed": seed, "code": code_hash(runtime(loaded.device)),
        "model": run.info["model"]["hash"], "benchmark": run.info["benchmark"]["version"],
        "trials": {name: run.trials[name]["options"] for name in chosen if name != "none"},
    }  # fmt: skip
    done = _open(run.folder, header)
    methods: dict[str, Method | None] = {
        name: None if name == "none" else Trial.stored(run.trials[name]).method for name in chosen
    }
    with sharing(loaded, settings) as shared, (run.folder / ROWS_FILE).open("a") as file:
        for number, group in enumerate(groups):
            if group[0].image_id not in done:
                prompts = Prompts(loaded, harness.benchmark, group)
                if shared is not None:
                    shared.remember(prompts.pixels)
                rows = [_row(own) for own in ask_image(prompts, methods, history)]
                # all of an image or nothing of it
                file.write("".join(json.dumps(row) + "\n" for row in rows))
                file.flush()
            progress(number + 1, len(groups))
    return list(chosen)


def draw_groups(items: Sequence[Item], pairs: int, seed: int) -> list[list[Item]]:
    """Questions of images drawn at random, until they make as many ordered pairs."""
    by_image: dict[str, list[Item]] = {}
    for item in items:
        by_image.setdefault(item.image_id, []).append(item)
    several = [own for own in by_image.values() if len(own) > 1]
    random = Random(seed)
    random.shuffle(several)
    groups, made = [], 0
    for own in several:
        if made >= pairs:
            break
        group = own if len(own) <= _MOST else random.sample(own, _MOST)
        groups.append(group)
        made += len(group) * (len(group) - 1)
    return groups


def _trials(run: Run, wanted: Sequence[str] | None) -> list[str]:
    """Names of the trials to ask, the unpruned model first."""
    judged = run.gates()
    usable = [
        name
        for name, trial in run.trials.items()
        if trial["method"] is not None and trial["status"] == "ok" and not trial["noise"]
        and name in judged and judged[name].outcome != "fail"
    ]  # fmt: skip
    for name in wanted or ():
        if name not in usable:
            raise ValueError(
                f"trial {name!r} is none that can be asked; run folder {run.folder} has "
                + ", ".join(usable)
            )
    chosen = usable if wanted is None else list(wanted)
    if not chosen:
        raise ValueError(f"run folder {run.folder}: has no trial with a method")
    return ["none", *chosen]


def _open(folder: Path, header: Mapping[str, Any]) -> set[str]:
    """Images that are done already under the same header; a cut-off last image is taken off.

    Raises:
        ValueError: the folder has answers of other settings.
    """
    path, rows = folder / HEADER_FILE, folder / ROWS_FILE
    if path.is_file() and rows.is_file():
        before = read_object(path)
        different = [name for name in header if before.get(name) != header[name]]
        if different:
            raise ValueError(
                f"{path}: holds answers of other settings ({', '.join(different)}); delete it and "
                f"{ROWS_FILE} to ask anew"
            )
        lines = rows.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        found = [parse_json(line) for line in whole]
        last = found[-1]["image"] if found and len(whole) < len(lines) else None
        if last is not None:
            kept = [line for line, row in zip(whole, found) if row["image"] != last]
            rows.write_text("".join(kept), encoding="utf-8")
        return {row["image"] for row in found} - {last}
    path.write_text(json.dumps(header, indent=1) + "\n", encoding="utf-8")
    rows.write_text("", encoding="utf-8")
    return set()


def _row(own: Answered) -> dict[str, Any]:
    return {
        "trial": own.trial, "image": own.second.image_id, "first": own.first.id,
        "second": own.second.id, "task": own.second.task, "answer": own.answer, "score": own.score,
        "overlap": None if own.overlap is None else round(own.overlap, 4), "error": own.error,
    }  # fmt: skip


__all__ = ["ask_second_questions", "draw_groups"]
