"""The looks at a trial, each by itself; None where there is nothing to look at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from tokprune.eval.benchmarks.base import normalise
from tokprune.eval.sweep.gate.pair import Pair, evidence

Outcome = Literal["ok", "warn", "fail"]

#: answers from which a share of them says something
ENOUGH = 20
#: the number of answers from which no difference at all is a failure by itself
MANY = 100


@dataclass(frozen=True)
class Check:
    """One look at a trial: ``name``, ``outcome``, what was seen in words (``text``) and in short
    (``value``)."""

    name: str
    outcome: Outcome
    text: str
    value: str = ""

    def to_dict(self) -> dict[str, str]:
        return {"name": self.name, "outcome": self.outcome, "text": self.text, "value": self.value}


def complete(pair: Pair) -> Check | None:
    """The same questions as the unpruned model, each once."""
    missing, more = pair.base.keys() - pair.rows.keys(), pair.rows.keys() - pair.base.keys()
    failed = sum(row["status"] != "ok" for row in pair.rows.values())
    without = sum(row["status"] != "ok" for row in pair.base.values())
    if failed > without:
        share = (failed - without) / len(pair.rows)
        text = f"{failed} of {len(pair.rows)} questions failed ({without} unpruned)"
        return Check("complete", "fail" if share > 0.05 else "warn", text)
    if missing or more:
        # a sweep that goes on; the report keeps it off the frontier until it has all of them
        return Check("complete", "warn", f"{len(missing)} of {len(pair.base)} questions lack an "
                     f"answer, and {len(more)} have no unpruned one")  # fmt: skip
    return Check("complete", "ok", f"{len(pair.rows)} questions")


def same_inputs(pair: Pair) -> Check | None:
    """The same prompts and images as the unpruned model saw."""
    known = [
        (own, plain)
        for row, base in pair.both
        if (own := evidence(row, "inputs")) is not None
        and (plain := evidence(base, "inputs")) is not None
    ]
    other = sum(own != plain for own, plain in known)
    if other:
        return Check("same inputs", "fail", f"{other} of {len(known)} prompts or images are others "
                     "than the unpruned model's")  # fmt: skip
    return Check("same inputs", "ok", f"{len(known)} compared") if known else None


def kept_as_planned(pair: Pair) -> Check | None:
    """As many tokens left as the budget says."""
    if not pair.patched or not pair.both:
        return None
    name = f"tokens_{pair.trial['match']}"
    # a budget is that of an image; another harness may not say how many there were
    images = [evidence(row, "images") for row, _ in pair.both]
    left = [
        row[name] / (n or 1)
        for (row, _), n in zip(pair.both, images, strict=True)
        if row[name] is not None
    ]
    if lacking := len(pair.both) - len(left):
        text = f"{lacking} answers have no record of the method"
        return Check("kept as planned", "fail" if any(images) else "warn", text)
    budget, mean = float(pair.trial["budget"]), sum(left) / len(left)
    off = abs(mean - budget)
    text = f"{mean:.1f} tokens of {budget:g}"
    short = f"{mean:.4g}"
    if off <= max(0.02 * budget, 0.5):
        return Check("kept as planned", "ok", text, short)
    # where images differ in size, or the method decides by them, a mean over others is another
    full = {base["tokens_in"] for _, base in pair.both}
    varies = len(set(left)) > 1 or len(full) > 1 or not any(images)
    return Check("kept as planned", "warn" if varies else "fail", text, short)


def really_shorter(pair: Pair) -> Check | None:
    """The cache itself holds less than the unpruned model's."""
    if not pair.patched or pair.keeps_all:
        return None
    caches = [
        (own, plain)
        for row, base in pair.both
        if (own := evidence(row, "cache")) is not None
        and (plain := evidence(base, "cache")) is not None
    ]
    if caches:
        shorter = sum(own < plain for own, plain in caches)
        text = f"the cache is shorter in {shorter} of {len(caches)} answers"
        value = f"{shorter}/{len(caches)}"
        return Check("really shorter", "ok" if shorter else "fail", text, value)
    told = [(row["kv_bytes"], base["kv_bytes"]) for row, base in pair.both]
    known = [(own, plain) for own, plain in told if own is not None and plain]
    if not known:
        return None
    shorter = sum(own < plain for own, plain in known)
    text = f"the record says shorter in {shorter} of {len(known)} answers"
    value = f"{shorter}/{len(known)} told"
    return Check("really shorter", "ok" if shorter else "fail", text, value)


def logits_moved(pair: Pair) -> Check | None:
    """The logits of the first token are others than the unpruned model's."""
    moved, known = pair.moved
    if not known or pair.keeps_all:
        return None
    text, value = f"logits moved in {moved} of {known} answers", f"{moved}/{known}"
    if moved == 0:
        return Check("logits moved", "warn" if pair.flips else "fail", text, value)
    return Check("logits moved", "warn" if 2 * moved < known else "ok", text, value)


def answers_moved(pair: Pair) -> Check | None:
    """Some answers are others than the unpruned model's."""
    n, flips = len(pair.both), pair.flips
    if not n or pair.keeps_all:
        return None
    moved, known = pair.moved
    gained = sum(row["score"] > base["score"] for row, base in pair.both)
    lost = sum(row["score"] < base["score"] for row, base in pair.both)
    text = f"{flips} of {n} answers changed (+{gained} −{lost} correct)"
    value = f"{flips}/{n} (+{gained} −{lost})"
    if flips == 0:
        if moved:
            text += f": under {300 / n:.1f} % of all (95 %)"
            return Check("answers moved", "ok", text, value)
        outcome: Outcome = "fail" if known or n >= MANY else "warn"
        return Check("answers moved", outcome, text, value)
    return Check("answers moved", "warn" if flips < 0.005 * n else "ok", text, value)


def not_empty(pair: Pair) -> Check | None:
    """Answers are not empty where the unpruned model's are not."""
    n = len(pair.both)
    if not n:
        return None
    empty = sum(not row["answer"].strip() for row, _ in pair.both)
    before = sum(not base["answer"].strip() for _, base in pair.both)
    share = (empty - before) / n
    text = f"{empty} of {n} answers are empty ({before} unpruned)"
    outcome: Outcome = "fail" if share > 0.2 else "warn" if share > 0.02 else "ok"
    return Check("not empty", outcome, text, str(empty))


def not_constant(pair: Pair) -> Check | None:
    """The commonest answer is not much commoner than the unpruned model's."""
    n = len(pair.both)
    if n < ENOUGH:
        return None
    said = Counter(normalise(row["answer"]) for row, _ in pair.both)
    before = Counter(normalise(base["answer"]) for _, base in pair.both)
    (answer, most), (_, usual) = said.most_common(1)[0], before.most_common(1)[0]
    share, rise = most / n, (most - usual) / n
    text = f"commonest answer {answer!r}: {share:.0%} ({usual / n:.0%} unpruned)"
    outcome: Outcome = "fail" if share > 0.85 and rise > 0.25 else "warn" if rise > 0.25 else "ok"
    words = said["yes"] + said["no"], before["yes"] + before["no"]
    if outcome == "ok" and min(words) == n:
        moved = (said["yes"] - before["yes"]) / n
        text = f"yes: {said['yes'] / n:.0%} of answers ({before['yes'] / n:.0%} unpruned)"
        outcome = "warn" if abs(moved) > 0.1 else "ok"
    return Check("not constant", outcome, text, f"{answer!r} {share:.0%}")


def finite(pair: Pair) -> Check | None:
    """No logit was NaN or infinite."""
    said = [value for row in pair.rows.values() if (value := evidence(row, "finite")) is not None]
    wrong = sum(not value for value in said)
    if wrong:
        return Check("finite", "fail", f"NaN or infinite logits in {wrong} of {len(said)} answers")
    return Check("finite", "ok", f"{len(said)} answers") if said else None


def plausible(pair: Pair) -> Check | None:
    """Accuracy between that without an image and that without compression."""
    n = len(pair.both)
    if n < ENOUGH:
        return None
    own = sum(row["score"] for row, _ in pair.both) / n
    full = sum(base["score"] for _, base in pair.both) / n
    spread = 3 * (max(own * (1 - own), 1 / n) / n) ** 0.5
    text = f"accuracy {own:.1%} (unpruned {full:.1%}"
    low = None
    if pair.blind:
        low = sum(row["score"] for row in pair.blind.values()) / len(pair.blind)
        text += f", blind {low:.1%}"
    outside = own > full + spread or (low is not None and own < low - spread)
    return Check("plausible", "warn" if outside else "ok", text + ")")


CHECKS: tuple[Callable[[Pair], Check | None], ...] = (
    complete, same_inputs, kept_as_planned, really_shorter, logits_moved, answers_moved, not_empty,
    not_constant, finite, plausible,
)  # fmt: skip


def same_as(pair: Pair, others: Sequence[Pair]) -> Check | None:
    """Whether an earlier trial is the same under another name."""
    for other in others:
        common = pair.rows.keys() & other.rows.keys()
        if len(common) < len(pair.rows) or pair.trial["variant"] == other.trial["variant"]:
            continue
        if any(pair.rows[i]["answer"] != other.rows[i]["answer"] for i in common):
            continue
        kept = [(evidence(pair.rows[i], "kept"), evidence(other.rows[i], "kept")) for i in common]
        name = other.trial["trial"]
        if all(own is not None and own == theirs for own, theirs in kept):
            return Check("distinct", "warn", f"the same as {name}: same tokens, same answers")
        if len(common) >= MANY:
            return Check("distinct", "warn", f"all answers are those of {name}")
    return None
