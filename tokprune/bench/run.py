"""The bench: methods at budgets on one model, against no compression and against the ideal."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tokprune.api import compress, is_patched
from tokprune.bench.break_even import Load, break_even
from tokprune.bench.clock import Spread, set_aside
from tokprune.bench.energy import energy_per_answer
from tokprune.bench.environment import environment
from tokprune.bench.gate import Interval, Verdict, judge, noise_floor
from tokprune.bench.ideal import Lengths, observe, shortened
from tokprune.bench.measure import PARTS, SELECTION_IN_ENCODER, Variant, measure
from tokprune.bench.memory import peak_memory
from tokprune.bench.prompts import EncodedImage, encode, prompt
from tokprune.bench.split import split
from tokprune.families import family_of
from tokprune.methods import Method, make_method
from tokprune.trace.flops import prefill_macs, unpruned_macs
from tokprune.trace.summary import visual_per_layer

SCHEMA = 3
#: the unpruned model, and once more as a control
NONE, AGAIN = "none", "none again"
#: parts that are compared; selection has no counterpart in the unpruned model
COMPARED = ("encoder", "prefill", "decode_per_token", "total")
#: what is going on, rounds done, rounds
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Trial:
    """A method at a budget."""

    #: its name in the result
    id: str
    method: Method
    #: as typed, None for a method object that brought its own
    keep: Any = None


def trials_of(
    methods: Sequence[str | Method], keeps: Sequence[Any], decoder_layers: int
) -> list[Trial]:
    """Trials of every method name at every budget, and of every method object as it is.

    Layer numbers that were published for 32 decoder layers are placed in decoders of another depth
    as :mod:`tokprune.methods.depth` says.

    Raises:
        ValueError, TypeError: no method, no budget for a name, an unknown method, a bad budget.
    """
    if not methods:
        raise ValueError("methods is empty; it should name at least one, see 'tokprune methods'")
    trials: list[Trial] = []
    for method in methods:
        if isinstance(method, Method):
            same = sum(trial.id.partition("#")[0] == method.name for trial in trials)
            trials.append(Trial(f"{method.name}#{same + 1}" if same else method.name, method))
            continue
        if not keeps:
            raise ValueError(f"keep is empty; {method!r} needs at least one budget (64, or 0.11)")
        for keep in keeps:
            at_keep = make_method(method, keep=keep)  # the name is checked before its layers are
            fitted = make_method(at_keep, **at_keep.options_for_depth(decoder_layers))
            trials.append(Trial(f"{fitted.name}@{keep}", fitted, keep))
    ids = [trial.id for trial in trials]
    twice = sorted({i for i in ids if ids.count(i) > 1})
    if twice:
        raise ValueError(f"{twice[0]} stands there twice; every method and budget should differ")
    return trials


def bench(
    model: Any,
    methods: Sequence[str | Method],
    keeps: Sequence[Any] = (),
    *,
    processor: Any = None,
    image: Any = None,
    rounds: int = 20,
    new_tokens: int | Sequence[int] = 16,
    batch_sizes: Sequence[int] = (1, 4),
    text_tokens: Sequence[int] = (32, 256),
    clock: str = "wall",
    name: str | None = None,
    progress: Progress | None = None,
    frames: int = 0,
    parts: Sequence[str] = PARTS,
    seconds: float | None = None,
) -> dict[str, Any]:
    """Measure methods against no compression and against the ideal, and find where they pay.

    At the first batch size, text length and answer length everything is measured (see
    :mod:`tokprune.bench.measure` for the parts, :mod:`tokprune.bench.ideal` for the ideal,
    :mod:`tokprune.bench.memory` and :mod:`tokprune.bench.energy` for peak memory and energy); at
    longer or shorter answers to the same prompt all but ``decode_per_token``; at the other points
    of the grid prefill and total. In each round every variant runs once, in alternating order: the
    unpruned model, all methods, their ideals, and the unpruned model again, which gives the noise
    floor.

    Args:
        model: a supported model, not patched.
        methods: names, each run at every one of ``keeps``; or method objects.
        keeps: visual tokens per image, as the methods' option ``keep`` (counts or fractions).
        processor: the model's own (None: random text, CLIP's image processing).
        image: a PIL image (None: one made in code).
        rounds: measurements of everything; below 6 no speed-up is ever claimed.
        new_tokens: length of an answer, or several, which the grid then has as a third side.
        batch_sizes, text_tokens: the grid; tokens of text besides the image's.
        clock: "wall", or "cpu" for the time of this process.
        name: what the model is called in the result.
        progress: called with what is going on.
        frames: 0: the image; else a video of so many frames made of it, at least 2.
        parts: which of :data:`~tokprune.bench.measure.PARTS` to measure; without ``total`` the
            break-even point is that of ``prefill``, one of the two has to be there.
        seconds: wall-clock time after which no new round starts, and no point after the first;
            None: no limit.

    Returns:
        JSON types: ``environment``, ``settings``, ``model``; ``unpruned`` and ``trials`` (tokens,
        FLOPs, KV bytes, peak memory, energy, break-even point for the first answer length and for
        each); ``points`` of the grid, each with ``noise_floor``, ``unpruned``, ``unpruned_split``
        and, per trial, ``seconds``, ``ideal_seconds``, ``speedup``, ``ideal_speedup`` and
        ``achieved`` (÷ ideal) by part and ``split`` (:mod:`tokprune.bench.split`), and the
        ``seconds`` of every round. A speed-up within noise is
        ``{"speedup": null, "reason": "within noise (…)", …}``.

    Raises:
        ValueError, TypeError: an argument, an option that does not fit the model; before any
            measurement, and naming what would be right.
    """
    lengths = [new_tokens] if isinstance(new_tokens, int) else list(new_tokens)
    _check_counts(rounds=[rounds], new_tokens=lengths)
    _check_counts(batch_sizes=batch_sizes, text_tokens=text_tokens)
    _check_limits(parts, seconds)
    end = None if seconds is None else time.perf_counter() + seconds
    family = family_of(model)
    known = family.parts(model)
    facts = family.facts(model, known)
    if is_patched(model):
        raise ValueError("the model is patched; call tokprune.unpatch(model) before measuring it")
    if clock == "cpu" and model.device.type != "cpu":
        raise ValueError(f"clock='cpu' sees no work of {model.device}; it should be 'wall'")
    trials = trials_of(methods, keeps, facts.decoder_layers)
    for trial in trials:
        trial.method.on(facts).plan(facts)
    encoded = encode(model, image, processor, frames)
    tokenizer = getattr(processor, "tokenizer", None)
    batches = [
        (t, prompt(model, encoded, t, b, tokenizer)) for b in batch_sizes for t in text_tokens
    ]
    grid = [_Place(inputs, text, length) for text, inputs in batches for length in lengths]
    first = grid[0].inputs
    by = "total" if "total" in parts else "prefill"

    result: dict[str, Any] = {
        "schema": SCHEMA,
        "environment": environment(model.device),
        "settings": {
            "rounds": rounds, "new_tokens": lengths, "batch_sizes": list(batch_sizes),
            "text_tokens": list(text_tokens), "clock": clock,
            "confidence": 0.95, "break_even_by": by, "parts": list(parts), "seconds": seconds,
        },
        "model": _model(model, name, encoded, facts.decoder_layers),
    }  # fmt: skip
    with set_aside():
        sizes = _sizes(model, first, trials, lengths[0] if by == "total" else None, progress)
        result["unpruned"] = sizes.pop(NONE)
        points = []
        for number, place in enumerate(grid):
            wanted = _wanted(parts, number == 0, place.inputs is first)
            label = f"{place} (point {number + 1} of {len(grid)})"
            rounds_of = _rounds_of(progress, label)
            left = None if end is None else end - time.perf_counter()
            found: dict[str, Any]
            if number and left is not None and left <= 0:
                found = {"error": f"not measured: the limit of {seconds:g} seconds was over"}
            else:
                # what is left of the time is shared by the points that are left
                enough = None if left is None else _after(left / (len(grid) - number))
                try:
                    found = _point(
                        model, place.inputs, trials, rounds, place.new_tokens, wanted, clock,
                        rounds_of, enough, int(number == 0 or place.inputs is not first),
                    )  # fmt: skip
                except torch.OutOfMemoryError as error:
                    if number == 0:
                        raise
                    found = {"error": f"out of memory: {str(error).splitlines()[0]}"}
            points.append({**place.to_dict(), **found})
    result["points"] = points
    result["trials"] = []
    for trial in trials:
        pays = {n: _break_even(points, trial.id, n, by).to_dict() for n in lengths
                if any("trials" in p and p["new_tokens"] == n for p in points)}  # fmt: skip
        result["trials"].append(
            {
                "trial": trial.id, "method": trial.method.name, "keep": trial.keep,
                "repr": repr(trial.method), **sizes[trial.id], "break_even": pays[lengths[0]],
                "break_even_by_new_tokens": {str(n): own for n, own in pays.items()},
            }
        )  # fmt: skip
    return result


@dataclass(frozen=True)
class _Place:
    """A point of the grid: a batch of prompts of ``text_tokens`` each, and a length of answers."""

    inputs: Mapping[str, Any]
    text_tokens: int
    new_tokens: int

    @property
    def load(self) -> Load:
        return Load.of(*self.inputs["input_ids"].shape)

    def __str__(self) -> str:
        return f"{self.load}, {self.new_tokens} new"

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.load.to_dict(), "text_tokens": self.text_tokens, "new_tokens": self.new_tokens,
        }  # fmt: skip


def _wanted(parts: Sequence[str], first: bool, same_prompt: bool) -> tuple[str, ...]:
    """What is measured at a point: less where only the answer is longer, or the prompt another."""
    if first:
        chosen = set(parts)
    else:
        chosen = set(parts) - {"decode_per_token"}
        chosen &= set(PARTS) if same_prompt else {"prefill", "total"}
    inside = (SELECTION_IN_ENCODER,) if "selection" in chosen else ()
    return tuple(part for part in PARTS if part in chosen) + inside


def _after(seconds: float) -> Callable[[], bool]:
    """Whether so many seconds from now are over."""
    end = time.perf_counter() + seconds
    return lambda: time.perf_counter() >= end


def _rounds_of(progress: Progress | None, what: str) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    return lambda done, rounds: progress(what, done, rounds)


def _check_limits(parts: Sequence[str], seconds: float | None) -> None:
    unknown = [part for part in parts if part not in PARTS]
    if unknown or not {"prefill", "total"} & set(parts):
        raise ValueError(
            f"parts={list(parts)} should be among {', '.join(PARTS)}, prefill or total with them"
        )
    if seconds is not None and not seconds > 0:
        raise ValueError(f"seconds={seconds!r} should be a positive number, or None for no limit")


def _check_counts(**named: Sequence[int]) -> None:
    for name, values in named.items():
        if not values:
            raise ValueError(f"{name} is empty; it should hold at least one number")
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} should be a whole number, at least 1")
        if len(set(values)) != len(values):
            raise ValueError(f"{name}={list(values)} names a number twice")


def _model(model: Any, name: str | None, encoded: EncodedImage, layers: int) -> dict[str, Any]:
    return {
        "name": name,
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "visual_tokens": encoded.tokens,
        "decoder_layers": layers,
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config.get_text_config()._attn_implementation,
    }


# ------------------------------------------------------------------- tokens, FLOPs, memory


def _sizes(
    model: Any,
    inputs: Mapping[str, Any],
    trials: Sequence[Trial],
    new_tokens: int | None,
    progress: Progress | None,
) -> dict[str, dict[str, Any]]:
    """Everything about a trial that is no time; per prompt, but peak memory and energy of the
    batch. ``new_tokens``: of an answer; None: prefills only, of which no energy is measured."""
    work = {n: v.to(model.device) for n, v in inputs.items()}
    rows = len(work["input_ids"])

    def answer() -> None:
        with torch.inference_mode():
            model.generate(
                **work, do_sample=False, num_beams=1, min_new_tokens=new_tokens or 1,
                max_new_tokens=new_tokens or 1, pad_token_id=0,
            )  # fmt: skip

    def energy() -> dict[str, Any]:
        if new_tokens is None:
            return {"joules": None, "reason": "no whole answers were measured"}
        return energy_per_answer(answer, model.device)

    answer()  # buffers that the libraries keep belong to nobody
    sizes: dict[str, dict[str, Any]] = {}
    for number, trial in enumerate(trials):
        if progress is not None:
            progress(f"tokens and memory of {trial.id}", number, len(trials))
        lengths = observe(model, inputs, trial.method)
        with compress(model, trial.method) as trace:
            peak = peak_memory(answer, model.device)
            joules = energy()
        assert trace.last is not None
        prefill = trace.last
        with shortened(model, lengths):
            ideal_peak = peak_memory(answer, model.device)
        visual = visual_per_layer(prefill)
        macs, unpruned = prefill_macs(prefill), unpruned_macs(prefill)
        sizes[trial.id] = {
            "tokens_last": sum(visual[-1]) / rows,
            "tokens_mean": sum(map(sum, visual)) / len(visual) / rows,
            "flops_prefill": 2 * macs.total // rows,
            "flops_decode_step": 2 * macs.decode_step // rows,
            "kv_bytes": sum(prefill.kv_bytes()) // rows,
            "peak_memory": peak.to_dict(),
            "ideal_peak_memory": ideal_peak.to_dict(),
            "energy": joules,
        }
        sizes.setdefault(
            NONE,
            {
                "tokens_last": sum(prefill.original_counts) / rows,
                "tokens_mean": sum(prefill.original_counts) / rows,
                "flops_prefill": 2 * unpruned.total // rows,
                "flops_decode_step": 2 * unpruned.decode_step // rows,
                "kv_bytes": prefill.kv_bytes_unpruned() // rows,
                "peak_memory": peak_memory(answer, model.device).to_dict(),
                "energy": energy(),
            },
        )
    return sizes


# ------------------------------------------------------------------- times


def ideal_name(trial: str) -> str:
    return f"{trial} ideal"


def _point(
    model: Any,
    inputs: Mapping[str, Any],
    trials: Sequence[Trial],
    rounds: int,
    new_tokens: int,
    parts: tuple[str, ...],
    clock: str,
    progress: Callable[[int, int], None] | None,
    enough: Callable[[], bool] | None = None,
    warmup: int = 1,
) -> dict[str, Any]:
    """Times of one batch, and what they say."""
    variants = {NONE: Variant.of(model, None)}
    for trial in trials:
        lengths = checked_lengths(model, inputs, trial)
        variants[trial.id] = Variant.of(model, trial.method)
        variants[ideal_name(trial.id)] = Variant(lambda seen=lengths: shortened(model, seen))  # type: ignore[misc]
    # the two equal variants at the two ends of a round: no pair of variants is farther apart
    variants[AGAIN] = Variant.of(model, None)
    times = measure(
        model, inputs, variants, rounds, new_tokens, parts=parts, clock=clock, progress=progress,
        enough=enough, warmup=warmup,
    )  # fmt: skip
    plain = times[NONE]
    compared = [part for part in COMPARED if part in plain]
    floors = {part: noise_floor(plain[part], times[AGAIN][part]) for part in compared}
    return {
        "noise_floor": {p: _finite(floor) for p, floor in floors.items()},
        "seconds": times,
        "unpruned": _spreads(plain),
        "unpruned_split": split(plain, plain),
        "trials": {
            trial.id: _compare(plain, times[trial.id], times[ideal_name(trial.id)], floors)
            for trial in trials
        },
    }


def checked_lengths(model: Any, inputs: Mapping[str, Any], trial: Trial) -> Lengths:
    """Lengths under a method, after a look at whether the ideal has them in every layer.

    Raises:
        RuntimeError: it has not.
    """
    lengths = observe(model, inputs, trial.method)
    with shortened(model, lengths):
        seen = observe(model, inputs)
    if seen != lengths:
        raise RuntimeError(f"{trial.id}: the ideal's lengths {seen} are not the method's {lengths}")
    return lengths


def _compare(
    plain: Mapping[str, list[float]],
    times: Mapping[str, list[float]],
    ideal: Mapping[str, list[float]],
    floors: Mapping[str, float],
) -> dict[str, Any]:
    """One trial at one point: its times and its ideal's, speed-ups of both, achieved ÷ ideal."""

    def verdicts(seconds: Mapping[str, list[float]]) -> dict[str, Any]:
        return {p: judge(plain[p], seconds[p], floor).to_dict() for p, floor in floors.items()}

    achieved = {
        # (unpruned ÷ method) ÷ (unpruned ÷ ideal), within rounds
        p: Interval.of([i / m for i, m in zip(ideal[p], times[p])]).to_dict()
        for p in floors
    }
    return {
        "seconds": _spreads(times),
        "ideal_seconds": _spreads(ideal),
        "speedup": verdicts(times),
        "ideal_speedup": verdicts(ideal),
        "achieved": achieved,
        "split": split(plain, times),
    }


def _spreads(times: Mapping[str, list[float]]) -> dict[str, dict[str, float]]:
    return {part: Spread.of(values).to_dict() for part, values in times.items()}


def _finite(value: float) -> float | None:
    return None if value == float("inf") else value


def _break_even(points: Sequence[Mapping[str, Any]], trial: str, new_tokens: int, by: str) -> Any:
    """Of the points with answers of one length."""
    return break_even(
        [
            (
                Load.of(point["batch_size"], point["prompt_tokens"]),
                Verdict.from_dict(point["trials"][trial]["speedup"][by]),
            )
            for point in points
            if "trials" in point and point["new_tokens"] == new_tokens
        ]
    )
