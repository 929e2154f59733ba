"""The run in a few sentences, and what to be careful about."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tokprune.eval.report.analysis import Analysis, Result, difference
from tokprune.eval.report.compare import Contest, Differences
from tokprune.eval.report.formatting import between, listed, percent, signed, with_interval
from tokprune.eval.report.oracle_section import sentence
from tokprune.eval.report.oracle_variants import VariantOracle

#: an unpruned model below this has not learned a task
LEARNED = 0.8


def highlights(
    analysis: Analysis,
    found: Differences,
    against: Contest | None,
    oracles: Sequence[VariantOracle] = (),
) -> list[str]:
    """The main results, most important first."""
    base, data = analysis.unpruned, analysis.data
    lines = [
        f"Unpruned: {with_interval(base.accuracy, base.interval)} % over "
        f"{len(data.headline)} headline tasks, {data.tokens} visual tokens."
    ]
    share = f"{analysis.at:g} tokens ({100 * analysis.at / data.tokens:.3g} %)"
    if against is not None:
        lines.append(f"At {share} the best method beats random: {versus_random(against)}")
        if against.interval[0] <= 0:
            lines[-1] = f"At {share} no method clearly beats random: {versus_random(against)}"
    if found.pairs:
        tasks = found.tasks()
        differing = [task for task, pairs in tasks.items() if pairs]
        lines.append(
            f"At {share} methods differ significantly from one another on {len(differing)} of "
            f"{len(tasks)} tasks" + (f": {listed(differing)}." if differing else ".")
        )
    lines += _shrinking(analysis, share)
    cheapest = within(analysis, 0.02)
    if cheapest is not None:
        lines.append(
            "The fewest FLOPs within 2 points of the unpruned model: "
            f"{cheapest.point.name} tokens, {signed(-cheapest.drop)} points, "
            f"{cheapest.cost('flops') / base.cost('flops'):.0%} of the FLOPs."
        )
    else:
        lines.append("No variant stays within 2 points of the unpruned model.")
    line = sentence(oracles)
    if line is not None:
        lines.append(line)
    gap = analysis.noise_gap
    if gap is not None and gap > 0:
        lines.append(
            "Noise floor: another batch size or dtype alone changes the unpruned model's accuracy "
            f"by up to {percent(gap, 2)} points; smaller gaps say nothing."
        )
    elif gap is not None:
        lines.append("Noise floor: another batch size or dtype does not change accuracy.")
    return lines


def versus_random(against: Contest) -> str:
    """The best method against the random control, in words."""
    text = (
        f"{against.best.point.variant} {percent(against.best.accuracy)} %, "
        f"{against.control.point.variant} {percent(against.control.accuracy)} %, "
        f"difference {signed(against.gap)} points {between(against.interval, sign=True)}"
    )
    if against.among > 1:
        text += (
            f", {between(against.corrected, sign=True)} once adjusted for being the best of "
            f"{against.among} on these very questions"
        )
    return text + "."


def within(analysis: Analysis, drop: float) -> Result | None:
    """The finished point of fewest FLOPs whose drop is no larger."""
    fair = [
        r for r in analysis.results
        if r.flips is not None and r.counts and not r.point.nominal and r.drop <= drop
        and r.cost("flops") < analysis.unpruned.cost("flops")
    ]  # fmt: skip
    return min(fair, key=lambda r: (r.cost("flops"), -r.accuracy), default=None)


def _shrinking(analysis: Analysis, share: str) -> list[str]:
    """How methods do against a smaller image."""
    here = analysis.at_budget()
    shrunk = next((r for r in here if r.point.variant == "downsample"), None)
    methods = [r for r in here if not r.point.control and r.point.engaged]
    if shrunk is None or not methods:
        return []
    better, worse = [], []
    for r in methods:
        _, bounds = difference(analysis, r, shrunk)
        if bounds[0] > 0:
            better.append(r.point.variant)
        elif bounds[1] < 0:
            worse.append(r.point.variant)
    return [
        f"Against the image down-sampled to {share}, {percent(shrunk.accuracy)} %: "
        f"{len(better)} of {len(methods)} methods are clearly better"
        + (f" ({listed(better)})" if better else "")
        + f", {len(worse)} clearly worse"
        + (f" ({listed(worse)})." if worse else ".")
    ]


def warnings(analysis: Analysis) -> list[str]:
    """What a reader must know before believing the numbers."""
    data, lines = analysis.data, []
    if not data.run["finished"]:
        lines.append("The sweep has not finished: these are results so far.")
    if data.errors:
        lines.append(f"{len(data.errors)} questions failed; they count as incorrect.")
    inert = [r for r in analysis.results if not r.point.engaged]
    if inert:
        names = listed([r.point.name for r in inert])
        lines.append(
            f"{len(inert)} points are no results, and count nowhere: {names}. See 'Did the methods "
            "act?'."
        )
    short = [r for r in analysis.results if r.missing]
    if short:
        lines.append(f"{len(short)} points lack answers; see the end of the page.")
    outside = [t for t in data.tasks if t not in data.headline]
    if outside:
        scores = (
            f"{t} ({percent(analysis.unpruned.tasks[t].accuracy)} % unpruned)" for t in outside
        )
        lines.append(f"Not in the headline average: {listed(list(scores))}.")
    weak = [
        t for t in data.headline
        if not math.isnan(analysis.unpruned.tasks[t].accuracy)
        and analysis.unpruned.tasks[t].accuracy < LEARNED
    ]  # fmt: skip
    if weak:
        lines.append(
            f"In the headline although the unpruned model is below {LEARNED:.0%} on "
            f"{'it' if len(weak) == 1 else 'them'}: {listed(weak)}."
        )
    if analysis.noise_gap is None:
        lines.append("The noise floor was not measured, so small gaps cannot be judged.")
    return lines + data.notes
