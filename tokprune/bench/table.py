"""A bench result as tables for a terminal of 100 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from tokprune.bench.clock import milliseconds
from tokprune.bench.gate import Interval, Verdict

_PARTS = {
    "encoder": "encoder", "selection": "selection", "prefill": "prefill",
    "decode_per_token": "per token", "total": "total",
}  # fmt: skip
#: points of the grid side by side
_ACROSS = 4


def tables(result: Mapping[str, Any]) -> list[Any]:
    """What rich can print, in order: a heading, times, where they go, speed-ups, sizes, the grid.

    Args:
        result: of :func:`tokprune.bench.run.bench`, also of schema 2.
    """
    parts: list[Any] = [_heading(result), _times(result)]
    parts += [_split(result, point) for point in result["points"] if point.get("unpruned_split")]
    parts += [_speedups(result), _sizes(result)]
    rest = result["points"][1:]
    for start in range(0, len(rest), _ACROSS):
        parts.append(_grid(result, rest[start : start + _ACROSS]))
    parts.append(_legend(result))
    return parts


def _table(title: str, columns: Sequence[str], left: int = 1) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for number, name in enumerate(columns):
        table.add_column(
            name, justify="left" if number < left else "right", no_wrap=number == 0,
            overflow="fold",
        )  # fmt: skip
    return table


def _heading(result: Mapping[str, Any]) -> str:
    model, env, settings = result["model"], result["environment"], result["settings"]
    name = "" if model["name"] is None else f"{model['name']}: "
    threads = f"{env['threads']} thread{'s' * (env['threads'] != 1)}"
    place = env["device"] if env["device"] != "cpu" else f"{env['cpu']}, {threads}"
    return (
        f"{name}{model['class']}, {_count(model['parameters'])} parameters,\n"
        f"{model['dtype']}, {model['attention']}, {model['visual_tokens']} visual tokens; "
        f"{place};\ntorch {env['torch']}, transformers {env['transformers']}; "
        f"{settings['rounds']} rounds, {_or(_lengths(result))} new tokens, "
        f"{settings['clock']} clock\n"
    )


def _lengths(result: Mapping[str, Any]) -> list[int]:
    """Lengths of the answers; before schema 3 there was one."""
    told = result["settings"]["new_tokens"]
    return [told] if isinstance(told, int) else list(told)


def _or(numbers: Sequence[int]) -> str:
    return " or ".join(map(str, numbers))


def _load(result: Mapping[str, Any], point: Mapping[str, Any]) -> str:
    text = f"batch {point['batch_size']} × {point['prompt_tokens']} tokens"
    return text if len(_lengths(result)) == 1 else f"{text} + {point['new_tokens']} new"


def _times(result: Mapping[str, Any]) -> Table:
    point = result["points"][0]
    table = _table(
        f"Milliseconds, median of rounds ({_load(result, point)})", ["", *_PARTS.values()]
    )

    def add(name: str, seconds: Mapping[str, Any]) -> None:
        table.add_row(
            name, *(milliseconds(seconds[p]["median"]) if p in seconds else "–" for p in _PARTS)
        )

    add("unpruned", point["unpruned"])
    for trial in result["trials"]:
        measured = point["trials"][trial["trial"]]
        add(trial["trial"], measured["seconds"])
        add("  its ideal", measured["ideal_seconds"])
    return table


_SPLIT = {
    "encoder": "encoder", "selection": "selection", "rest_of_prefill": "rest of\nprefill",
    "decode": "decode",
}  # fmt: skip


def _split(result: Mapping[str, Any], point: Mapping[str, Any]) -> Table:
    """Milliseconds and shares of the parts, and the bound that the encoder sets."""
    table = _table(
        f"Where the time goes, ms ({_load(result, point)})",
        ["", *_SPLIT.values(), "total", "infinitely fast\nlanguage model"],
    )
    rows = {"unpruned": point["unpruned_split"]}
    rows |= {trial: own["split"] for trial, own in point["trials"].items()}
    for name, own in rows.items():
        shares = (
            f"{milliseconds(own[part])} ({100 * own[part] / own['total']:.0f} %)"
            if part in own else "–" for part in _SPLIT
        )  # fmt: skip
        bound = f"{own['bound']['median']:.2f}×"
        table.add_row(name, *shares, milliseconds(own["total"]), bound)
    return table


def _speedups(result: Mapping[str, Any]) -> Table:
    point = result["points"][0]
    table = _table(
        f"Speed-up over unpruned ({_load(result, point)})",
        ["", "of", "method", "ideal", "achieved ÷ ideal"],
        left=2,
    )
    for trial in result["trials"]:
        measured = point["trials"][trial["trial"]]
        for number, part in enumerate(p for p in _PARTS if p in measured["speedup"]):
            table.add_row(
                "" if number else trial["trial"],
                _PARTS[part],
                verdict(measured["speedup"][part]),
                verdict(measured["ideal_speedup"][part]),
                _achieved(measured["achieved"][part]),
            )
        table.add_section()
    return table


def verdict(data: Mapping[str, Any]) -> str:
    """A finding with its interval, or why there is none."""
    seen = Verdict.from_dict(dict(data))
    if seen.speedup is None:
        return str(seen).replace(" (", "\n(")
    return f"{seen} ({seen.ratio.low:.2f}–{seen.ratio.high:.2f})"


def _achieved(data: Mapping[str, Any]) -> str:
    seen = Interval.from_dict(dict(data))
    text = f"{100 * seen.median:.0f} %"
    if data["low"] is None:
        return text
    mark = " ~" if seen.low <= 1 <= seen.high else ""
    return f"{text} ({100 * seen.low:.0f}–{100 * seen.high:.0f}){mark}"


def _sizes(result: Mapping[str, Any]) -> Table:
    energy = _joules(result["unpruned"]) is not None
    table = _table(
        "Size and break-even",
        ["", "tokens\nlast/mean", "TFLOPs" if _tera(result) else "GFLOPs", "KV cache",
         "peak memory\n(ideal)", *(["joules"] if energy else []),
         f"pays ({result['settings']['break_even_by']})"],
    )  # fmt: skip
    table.columns[-1].justify = "left"
    scale = 1e12 if _tera(result) else 1e9
    for name, trial in [("unpruned", result["unpruned"])] + [
        (trial["trial"], trial) for trial in result["trials"]
    ]:
        ideal = trial.get("ideal_peak_memory")
        memory = data_size(trial["peak_memory"]["bytes"])
        table.add_row(
            name,
            f"{trial['tokens_last']:.0f}/{trial['tokens_mean']:.0f}",
            f"{trial['flops_prefill'] / scale:.3g}",
            data_size(trial["kv_bytes"]),
            memory if ideal is None else f"{memory} ({data_size(ideal['bytes'])})",
            *([f"{_joules(trial):.3g}"] if energy else []),
            _pays(trial),
        )
    return table


def _joules(trial: Mapping[str, Any]) -> float | None:
    """Energy of the first point's batch; None where it was not measured."""
    joules: float | None = trial.get("energy", {}).get("joules")
    return joules


def _pays(trial: Mapping[str, Any]) -> str:
    """The break-even point, of each length of answers where there are several."""
    lengths = trial.get("break_even_by_new_tokens", {})
    if len(lengths) < 2:
        return str(trial["break_even"]["text"]) if "break_even" in trial else ""
    return "\n".join(f"{length} new: {own['text']}" for length, own in lengths.items())


def _grid(result: Mapping[str, Any], points: Sequence[Mapping[str, Any]]) -> Table:
    by = result["settings"]["break_even_by"]
    table = _table(
        f"Speed-up of {by}, method / ideal", ["", *(_load(result, point) for point in points)]
    )
    for trial in result["trials"]:
        texts = []
        for point in points:
            if "error" in point:
                texts.append(point["error"])
                continue
            measured = point["trials"][trial["trial"]]
            pair = (_short(measured[kind], by) for kind in ("speedup", "ideal_speedup"))
            texts.append(" / ".join(pair))
        table.add_row(trial["trial"], *texts)
    return table


def _short(verdicts: Mapping[str, Any], by: str) -> str:
    seen = Verdict.from_dict(verdicts[by])
    return "noise" if seen.speedup is None else str(seen)


def _legend(result: Mapping[str, Any]) -> str:
    floors = result["points"][0]["noise_floor"]
    known = [f"{_PARTS[p]} {f:.3f}×" for p, f in floors.items() if f is not None]
    source = result["unpruned"]["peak_memory"]["source"]
    return (
        f"Noise floor, unpruned against itself: {', '.join(known) or 'too few rounds'}.\n"
        "Ideal: the same model on as many tokens per layer, with no method work.\n"
        "Ratios are taken within rounds; in brackets the 95 % interval of their median. A speed-up "
        "is\nprinted where that interval lies beyond the noise floor. ~: it holds 100 %.\n"
        "Selection: time in the method's own code, a share of encoder and prefill.\n"
        f"{_split_legend(result)}"
        "FLOPs (2 × MACs) and KV cache: one prefill, per prompt. Peak memory: whole batch, beyond "
        f"weights\nand inputs ({source}).{_energy_legend(result)}"
    )


def _split_legend(result: Mapping[str, Any]) -> str:
    if not any(point.get("unpruned_split") for point in result["points"]):
        return ""
    return (
        "Infinitely fast language model: what no pruning after the encoder can pass, unpruned "
        "total ÷\nencoder; where the time goes, selection is taken out of the other parts.\n"
    )


def _energy_legend(result: Mapping[str, Any]) -> str:
    energy = result["unpruned"].get("energy")
    if energy is None:
        return ""
    if energy["joules"] is None:
        return f"\nEnergy: not measured ({energy['reason']})."
    return f"\nJoules: a whole batch's answers of the first length ({energy['source']})."


def _tera(result: Mapping[str, Any]) -> bool:
    return bool(result["unpruned"]["flops_prefill"] >= 1e12)


def data_size(count: float) -> str:
    """Bytes in binary units, three digits."""
    for unit in ("B", "KiB", "MiB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"


def _count(number: int) -> str:
    if number >= 1e9:
        return f"{number / 1e9:.2f} B"
    return f"{number / 1e6:.1f} M" if number >= 1e6 else f"{number:,}"
