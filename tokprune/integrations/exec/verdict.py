"""What a run came to: numbers of its models, and whether all that they answered was compressed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

#: kinds of prompts in which no image was seen; :mod:`~tokprune.integrations.exec.watch` has them
KINDS = ("text", "beside", "unpatched")


@dataclass
class ModelCount:
    """What the models of one class with one method were asked, in all processes.

    ``prompts``: with images, and compressed, ``reduced`` of them to fewer tokens; ``before``,
    ``after``, ``mean``: visual tokens of all of them together, in the last decoder layer, and in
    the mean of its layers; ``text``, ``beside``, ``unpatched``: prompts that no image was seen in.
    """

    model: str
    method: str
    loaded: int = 0
    idle: int = 0
    prompts: int = 0
    reduced: int = 0
    before: int = 0
    after: int = 0
    mean: float = 0.0
    text: int = 0
    beside: int = 0
    unpatched: int = 0


@dataclass
class Verdict:
    """``models``; ``problems``: why a strict run has failed, one sentence each; ``notes``: what
    else happened; ``table``: tokens per layer of the first prompt, where there was one."""

    models: list[ModelCount]
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    table: str | None = None

    @classmethod
    def of(cls, events: Sequence[Mapping[str, Any]]) -> Verdict:
        """From the events of a run."""
        counts = _counts(events)
        models: dict[tuple[str, str], ModelCount] = {}
        for count in counts:
            name = count.model, count.method
            _add(models.setdefault(name, ModelCount(*name)), count)
        verdict = cls(list(models.values()))
        verdict.table = next((e["text"] for e in events if e["event"] == "table"), None)
        verdict.problems += _unique(
            f"{e['model']} could not be patched: {e['reason']}"
            for e in events
            if e["event"] == "failed"
        )
        verdict.notes += _unique(
            f"{e['model']} was left as it is: {e['reason']}" for e in events
            if e["event"] == "refused"
        )  # fmt: skip
        if not counts:
            verdict.problems.append(_nothing_loaded(events))
            return verdict
        verdict.problems += _unique(p for count in counts for p in _problems(count))
        if not any(_answered(count) for count in counts):
            verdict.problems.append("no prompt reached a patched model")
        return verdict


def _counts(events: Iterable[Mapping[str, Any]]) -> list[ModelCount]:
    """Numbers of every single model."""
    single: dict[tuple[int, int], ModelCount] = {}
    for event in events:
        if event["event"] not in ("loaded", "asked", "prefill"):
            continue
        key = event["process"], event["number"]
        # a process that was forked has models that its parent loaded
        count = single.setdefault(key, ModelCount(event["model"], event["method"]))
        if event["event"] == "loaded":
            count.loaded = 1
        elif event["event"] == "asked":
            setattr(count, event["kind"], getattr(count, event["kind"]) + event["prompts"])
        else:
            for name in ("prompts", "reduced", "before", "after", "mean"):
                setattr(count, name, getattr(count, name) + event[name])
    return list(single.values())


def _add(total: ModelCount, one: ModelCount) -> None:
    for name in ("loaded", "prompts", "reduced", "before", "after", "mean", *KINDS):
        setattr(total, name, getattr(total, name) + getattr(one, name))
    total.idle += not _answered(one)


def _answered(count: ModelCount) -> int:
    return count.prompts + sum(getattr(count, kind) for kind in KINDS)


def _problems(count: ModelCount) -> list[str]:
    found = []
    if count.beside:
        found.append(
            f"prompts came to the language model of {count.model} as embeddings, past the patch: "
            "the script puts its prompts together by itself"
        )
    if count.unpatched:
        found.append(f"{count.model} answered after the script had taken the patch off")
    if count.text and not count.prompts:
        found.append(f"{count.model} answered, and no prompt had an image")
    if count.prompts and not count.reduced:
        found.append(
            f"{count.model} kept every token of every image: {count.method} asks for as many as "
            "its images have"
        )
    return found


def _nothing_loaded(events: Iterable[Mapping[str, Any]]) -> str:
    text = "no supported model was loaded by from_pretrained"
    absent = _unique(f"{e['python']} ({e['reason']})" for e in events if e["event"] == "absent")
    if absent:
        return f"{text}; tokprune is not installed for {', '.join(absent)}"
    return text + (
        " (vLLM loads its own: see 'tokprune vllm-overrides'; python -I, -E and -S hide the patch)"
    )


def _unique(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))
