"""``tokprune recommend``: the best setting of a sweep under limits."""

from __future__ import annotations

import json
import re
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from tokprune.cli.app import BadInput, app
from tokprune.cli.values import parse_amount, parse_seconds
from tokprune.words import parse_budget


class Minimise(str, Enum):
    flops, latency, tokens = "flops", "latency", "tokens"


@app.command()
def recommend(
    run: Annotated[Path, typer.Argument(help="Run folder of 'tokprune sweep'.")],
    max_drop: Annotated[
        str | None, typer.Option(help="Largest loss of macro accuracy: 2% or 0.02.")
    ] = None,
    max_latency: Annotated[
        str | None, typer.Option(help="Longest measured time of one answer: 120ms or 0.12s.")
    ] = None,
    max_tokens: Annotated[
        str | None,
        typer.Option(
            help="Most visual tokens per image, mean over layers: 64, or a share of the unpruned "
            "ones (1/4, 0.25, 25%)."
        ),
    ] = None,
    min_accuracy: Annotated[
        str | None, typer.Option(help="Least macro accuracy: 80% or 0.8.")
    ] = None,
    minimise: Annotated[
        Minimise | None, typer.Option(help="Which cost to save (default: flops).")
    ] = None,
    confident: Annotated[
        bool, typer.Option("--confident", help="Limits on accuracy hold for the 95 % interval.")
    ] = False,
    report_on: Annotated[
        Path | None,
        typer.Option(help="Run folder of other images to report on, instead of halves."),
    ] = None,
    same_questions: Annotated[
        bool,
        typer.Option(
            "--same-questions",
            help="Choose and report on the same questions, which flatters what is chosen.",
        ),
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the halves and the intervals.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the setting to a JSON file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the setting as JSON.")] = False,
) -> None:
    """Choose the best setting of a sweep: the cheapest that is accurate enough, or the best that
    is cheap enough. It is chosen by one half of the images, and reported on the other."""
    limits = {
        "max_drop": _share(max_drop, "--max-drop", "2% or 0.02"),
        "max_latency": None if max_latency is None else parse_seconds(max_latency, "--max-latency"),
        "max_tokens": parse_amount(max_tokens, "--max-tokens"),
        "min_accuracy": _share(min_accuracy, "--min-accuracy", "80% or 0.8"),
    }
    if all(value is None for value in limits.values()):
        raise BadInput(
            "give at least one limit: --max-drop, --max-latency, --max-tokens or --min-accuracy"
        )
    if report_on is not None and same_questions:
        raise BadInput("--report-on and --same-questions exclude each other")
    if out is not None and not out.absolute().parent.is_dir():
        raise BadInput(f"--out {out}: no such folder")
    from tokprune.eval.recommend import recommend as choose
    from tokprune.methods.setting import save_setting

    try:
        found = choose(
            run,
            max_drop=limits["max_drop"],
            max_latency=limits["max_latency"],
            max_tokens=limits["max_tokens"],
            min_accuracy=limits["min_accuracy"],
            minimise=None if minimise is None else minimise.value,
            confident=confident,
            report_on=report_on,
            same_questions=same_questions,
            seed=seed,
        )
    except ImportError as error:
        raise BadInput(str(error)) from None
    if out is not None:
        save_setting(found.setting, out)
    for line in found.warnings:
        print(f"Warning: {line}", file=sys.stderr)
    if as_json:
        print(json.dumps(found.setting, indent=1))
        return
    _print(found)
    if out is not None:
        print(f"\nsetting: {out}")


def _print(found: Any) -> None:
    from tokprune.eval.report.formatting import between, milliseconds, number, percent, signed

    r, evidence = found.result, found.setting["evidence"]
    print(found.setting["repr"])
    if not evidence["chosen_on"]["same_questions"]:
        print(
            f"chosen by {found.chosen.n} questions (accuracy {percent(found.chosen.accuracy)} %), "
            f"reported on {r.n} about other images:"
        )
    print(
        f"accuracy {percent(r.accuracy)} % {between(r.interval)}, unpruned "
        f"{percent(evidence['unpruned'])} %: {signed(-r.drop)} points "
        f"{between((-r.drop_interval[1], -r.drop_interval[0]), sign=True)}"
    )
    print(
        f"tokens {number(evidence['tokens_mean'])} (mean over layers), "
        f"{evidence['macs'] / evidence['macs_unpruned']:.0%} of the FLOPs of a prefill"
        + (
            f", {milliseconds(evidence['latency'])} ms instead of "
            f"{milliseconds(evidence['latency_unpruned'])} ms"
            if evidence["latency"] is not None and evidence["latency_unpruned"] is not None
            else ""
        )
    )


def _share(text: str | None, option: str, example: str) -> float | None:
    if text is None:
        return None
    if re.fullmatch(r"0+(?:\.0*)?\s*%?", text.strip()):
        return 0.0
    try:
        value = parse_budget(text, option)
    except ValueError:
        value = 2
    if isinstance(value, int) and value > 1:
        raise BadInput(f"{option} {text!r} should be a share between 0 and 100 %: {example}")
    return float(value)
