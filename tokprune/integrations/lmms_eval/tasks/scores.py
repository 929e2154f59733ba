"""A score from 0 to 1 for every document that lmms-eval answered, from what its tasks log.

lmms-eval aggregates in the task: what it logs per document is sometimes a score, sometimes an
object that only the aggregation understands. The rules below read the usual suites (facts: the
``process_results`` functions of lmms-eval 0.7.3); anything else has to log one plain score.
"""

from __future__ import annotations

import ast
import contextlib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tokprune.eval.benchmarks.scores.letters import chosen

Sample = Mapping[str, Any]

#: fields of a logged sample that are not metrics
FIELDS = frozenset({
    "arguments", "doc", "doc_hash", "doc_id", "filtered_resps", "input", "input_media", "resps",
    "target", "token_counts",
})  # fmt: skip
#: metrics that hold an answer for a server to score
_UNSCORED = frozenset({"submission", "bypass"})
#: where a task logs several scores, the first of these is its score of a document
_PREFERRED = (
    "exact_match", "accuracy", "acc", "average", "overall", "score", "anls", "relaxed_overall",
    "llm_as_judge_eval",
)  # fmt: skip
#: fields of a logged object that hold its score
_WITHIN = ("score", "correct", "is_correct", "accuracy")


class NoScoreError(ValueError):
    """A task logs nothing that could be read as a score of a document."""


@dataclass(frozen=True)
class Rule:
    """How tasks whose name matches ``names`` (whole name) are scored. ``metrics``: what they must
    log, one of them."""

    names: str
    metrics: tuple[str, ...]
    read: Callable[[Any], float | None]

    def fits(self, task: str) -> bool:
        return re.fullmatch(self.names, task) is not None


# ------------------------------------------------------------------------------- reading


def _number(value: Any) -> float | None:
    """A number in [0, 1], None for anything else. Numbers of numpy are logged as text."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if not isinstance(value, (int, float)) or not math.isfinite(value) or not 0 <= value <= 1:
        return None
    return float(value)


def _logged(value: Any) -> float | None:
    """A plain score, or the score field of an object."""
    if isinstance(value, Mapping):
        found = (_number(value[name]) for name in _WITHIN if name in value)
        return next((score for score in found if score is not None), None)
    return _number(value)


def _at_least_half(value: Any) -> float | None:
    """A logged score of at least a half is a correct answer."""
    score = _logged(value)
    return None if score is None else float(score >= 0.5)


def _letter(value: Any) -> float | None:
    """Multiple choice: the option that the answer means."""
    if not isinstance(value, Mapping):
        return None
    correct = str(value.get("answer", "")).strip().upper()
    if not re.fullmatch(r"[A-Z]", correct):
        return None  # a split whose answers are not public
    answer = str(value.get("prediction", value.get("pred", "")))
    texts = {name: _plain(value.get(name)) for name in "ABCDEFGH"}
    options = {name: text for name, text in texts.items() if text}
    return float(chosen(answer, options) == correct)


def _plain(value: Any) -> str:
    text = str(value or "").strip()
    return "" if text.lower() == "nan" else text


def _first_letter(value: Any) -> float | None:
    """SEED-Bench: the task has cut the answer down to its first letter."""
    if not isinstance(value, Mapping) or "pred" not in value or "answer" not in value:
        return None
    answer, correct = (str(value[name]).strip().lower() for name in ("pred", "answer"))
    return float(answer == correct)


def _parsed(value: Any) -> float | None:
    """MMMU: the task has parsed the answer; options must be equal, open answers contain one of the
    correct ones, or be that number."""
    if not isinstance(value, Mapping) or "parsed_pred" not in value:
        return None
    parsed = value["parsed_pred"]
    answer = parsed if isinstance(parsed, list) else [parsed]
    correct = value.get("answer")
    if isinstance(correct, str) and correct.strip().startswith("["):
        with contextlib.suppress(ValueError, SyntaxError):
            correct = ast.literal_eval(correct)
    accepted = correct if isinstance(correct, list) else [correct]
    if value.get("question_type") == "multiple-choice":
        return float(any(one in accepted for one in answer))
    candidates = [one for part in answer for one in (part if isinstance(part, list) else [part])]
    wanted = [form for one in accepted for form in _open_forms(str(one))]
    return float(any(_open_match(one, form) for one in candidates for form in wanted))


def _open_forms(text: str) -> list[str | float]:
    """An accepted answer as it is looked for: a number with two decimals, or lower case."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def _open_match(answer: Any, wanted: str | float) -> bool:
    if isinstance(answer, str):
        return isinstance(wanted, str) and wanted in answer
    return bool(answer == wanted)


#: the first rule whose names fit a task decides
RULES: tuple[Rule, ...] = (
    Rule(r"pope(_.*)?", ("pope_accuracy",), _at_least_half),
    Rule(r"mme", ("mme_perception_score", "mme_cognition_score"), _at_least_half),
    Rule(r"mmstar(_.*)?", ("average",), _at_least_half),
    Rule(r"ocrbench", ("ocrbench_accuracy",), _at_least_half),
    Rule(r"chartqa(_lite)?", ("relaxed_overall",), _logged),
    Rule(r"gqa(_lite)?", ("exact_match",), _logged),
    Rule(r"mmbench_.*", ("gpt_eval_score", "submission"), _letter),
    Rule(r"(textvqa|vqav2|vizwiz_vqa|ok_vqa)_?.*", ("exact_match",), _logged),
    Rule(r"scienceqa(_.*)?", ("exact_match",), _logged),
    Rule(r"seedbench(_lite)?", ("seed_all",), _first_letter),
    Rule(r"mmmu_(val|group_img_val).*", ("mmmu_acc",), _parsed),
)


# ------------------------------------------------------------------------------- scoring


def metrics_of(sample: Sample) -> dict[str, Any]:
    """What a task logged for a document, beside the fields that every sample has."""
    return {name: value for name, value in sample.items() if name not in FIELDS}


def check_task(task: str, metrics: Iterable[str]) -> None:
    """Whether a task can be scored per document, as far as the names of its metrics tell.

    Raises:
        NoScoreError: it only writes answers for a server to score.
    """
    names = list(metrics)
    if any(rule.fits(task) and set(rule.metrics) & set(names) for rule in RULES):
        return
    if names and all(name in _UNSCORED for name in names):
        raise NoScoreError(
            f"task {task!r} logs {', '.join(names)} and no score of its own (its answers are not "
            "public); choose its validation split"
        )


def score(task: str, sample: Sample) -> float:
    """Score of one document in [0, 1].

    Args:
        task: name of the lmms-eval task.
        sample: a line of its ``*_samples_*.jsonl``: metric names beside the fields of the sample.

    Raises:
        NoScoreError: no rule fits; names the task and what it logged.
    """
    logged = metrics_of(sample)
    for rule in RULES:
        if rule.fits(task):
            # the first that the document was scored by: MME logs one of two
            names = [name for name in rule.metrics if name in logged]
            value = next((v for n in names if (v := rule.read(logged[n])) is not None), None)
            if value is not None:
                return value
    return _only_score(task, logged)


def _only_score(task: str, logged: Mapping[str, Any]) -> float:
    """The one score that a task logged; several must be equal, or one of them a usual name."""
    found = {
        name: value
        for name, raw in logged.items()
        if name not in _UNSCORED and (value := _logged(raw)) is not None
    }
    for name in _PREFERRED:
        if name in found:
            return found[name]
    if len(set(found.values())) == 1:
        return next(iter(found.values()))
    why = "none of them a score in [0, 1]" if not found else "several scores that differ"
    raise NoScoreError(
        f"task {task!r} logs {', '.join(logged) or 'nothing'} for a document: {why}, and there is "
        "no rule for it in tokprune/integrations/lmms_eval/tasks/scores.py"
    )
