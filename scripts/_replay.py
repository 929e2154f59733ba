"""The methods section of the benchmark: a method, its replay without scoring, and its ideal."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

import tokprune
from tokprune.bench.clock import Spread, milliseconds, no_garbage_collection, once
from tokprune.bench.ideal import observe, shortened
from tokprune.bench.instrumented import Instrumented, Place
from tokprune.bench.models import PRESETS, Shape, random_model
from tokprune.bench.prompts import encode, prompt
from tokprune.engine.contracts import (
    DecoderRun,
    DecoderStage,
    EncoderOutcome,
    EncoderRun,
    EncoderStage,
    ImageTokens,
    KeepDecision,
    ModelFacts,
    Plan,
    PromptStage,
    Reduction,
    ScoringLayer,
    Selection,
    SequenceView,
    TowerInput,
    TowerTokens,
)
from tokprune.methods import Method, image_methods, make_method
from tokprune.methods.registry import options_for_depth

KEEP = 64
SHAPES = {
    "small": PRESETS["small"],
    #: as wide as CLIP-L, so that what grows with width has its share of the time
    "wide": Shape(12, 1024, 4096, 16, 8, 1024, 2816, 8, 8, vocabulary=256),
    "quick": Shape(12, 96, 256, 4, 8, 96, 256, 4, 4, vocabulary=256),
}
#: text tokens around the image
TEXT = 64

#: further settings worth a row of their own: label → (method, options beside the budget)
_EXTRA: dict[str, tuple[str, dict[str, Any]]] = {
    "todre (k-center)": ("todre", {"select": "k_center"}),
    "transprune (TTV only)": ("transprune", {"alpha": 1.0}),
}


def labels() -> list[str]:
    """Every registered method, and the further settings of those there are. (M3 pools as ``pool``
    does, and has no 64 tokens of 576.)"""
    names = [name for name in image_methods() if name != "m3"]
    return sorted([*names, *(label for label, (name, _) in _EXTRA.items() if name in names)])


def method_of(label: str, decoder_layers: int) -> Method:
    name, changes = _EXTRA.get(label, (label, {}))
    return make_method(name, keep=KEEP, **{**options_for_depth(name, decoder_layers), **changes})


# -------------------------------------------------------------------------------- recorder


@dataclass
class Recorder:
    """What a method decided in one prefill, by stage number; an observer for ``Instrumented``."""

    rows: dict[tuple[int, str, int], Reduction] = field(default_factory=dict)
    outcomes: dict[int, EncoderOutcome] = field(default_factory=dict)
    selections: dict[int, list[Selection | None]] = field(default_factory=dict)
    keeps: dict[tuple[int, int], KeepDecision] = field(default_factory=dict)

    def __call__(self, place: Place, function: Callable[..., Any], *arguments: Any) -> Any:
        answer = function(*arguments)
        if answer is None:
            return None
        if place.call in ("between", "after"):
            assert place.layer is not None
            rows = Reduction(answer.rows.clone(), counts=answer.counts)
            self.rows[place.stage, place.call, place.layer] = rows
        elif place.call == "finish":
            self.outcomes[place.stage] = EncoderOutcome(key=answer.key, unpad=answer.unpad)
        elif place.call == "select":
            self.selections[place.stage] = [
                None if a is None else Selection(a.index.clone()) for a in answer
            ]
        elif place.call == "before_layer":
            assert place.layer is not None
            sequence: SequenceView = arguments[2]
            counts = [
                [int((answer.mask[b] & (sequence.segment[b] == s)).sum()) for s in range(len(row))]
                for b, row in enumerate(sequence.counts)
            ]
            self.keeps[place.stage, place.layer] = KeepDecision(
                answer.mask.clone(), counts, answer.positions
            )
        return answer


# ------------------------------------------------------------------------------ replay


@dataclass(frozen=True)
class Replay(Method):
    """Drops what a recorder says, where it says: gathers and the engine's book-keeping, no scoring.
    Merges are gathers of the rows that stand for the merged ones; caches are left alone."""

    name: ClassVar[str] = "bench-replay"
    inner: Method
    recorder: Recorder

    def plan(self, facts: ModelFacts) -> Plan:
        plan = self.inner.plan(facts)
        return Plan(
            encoder=tuple(
                _ReplayEncoder(i, s, self.recorder) for i, s in enumerate(plan.encoder) if s.reduces
            ),
            prompt=tuple(_ReplayPrompt(i, s, self.recorder) for i, s in enumerate(plan.prompt)),
            decoder=tuple(_ReplayDecoder(i, self.recorder) for i in range(len(plan.decoder))),
        )


class _ReplayEncoder(EncoderStage):
    def __init__(self, number: int, inner: EncoderStage, recorder: Recorder) -> None:
        self.number, self.recorder = number, recorder
        own = [(place, layer) for n, place, layer in recorder.rows if n == number]
        self.between_layers = frozenset(layer for place, layer in own if place == "between")
        self.after_tower = inner.after_tower
        if inner.after_tower is None:
            self.after_layers = frozenset(layer for place, layer in own if place == "after")
        self.order, self.positions = inner.order, inner.positions
        self.extra_tokens = inner.extra_tokens

    def start(self, tower: TowerInput) -> EncoderRun:
        return _ReplayEncoderRun(self.number, self.recorder)


class _ReplayEncoderRun(EncoderRun):
    def __init__(self, number: int, recorder: Recorder) -> None:
        self.number, self.recorder = number, recorder

    def between(self, layer: int, hidden: Tensor, tokens: TowerTokens) -> Reduction | None:
        return self.recorder.rows.get((self.number, "between", layer))

    def after(self, layer: int, hidden: Tensor, tokens: TowerTokens) -> Reduction | None:
        return self.recorder.rows.get((self.number, "after", layer))

    def finish(self, tokens: TowerTokens) -> EncoderOutcome:
        return self.recorder.outcomes[self.number]


class _ReplayPrompt(PromptStage):
    def __init__(self, number: int, inner: PromptStage, recorder: Recorder) -> None:
        self.number, self.recorder, self.positions = number, recorder, inner.positions

    def select(self, images: Sequence[ImageTokens]) -> list[Selection | None]:
        return self.recorder.selections[self.number]


class _ReplayDecoder(DecoderStage):
    def __init__(self, number: int, recorder: Recorder) -> None:
        self.number, self.recorder = number, recorder
        self.prune_before = frozenset(layer for n, layer in recorder.keeps if n == number)

    def start(self) -> DecoderRun:
        return _ReplayDecoderRun(self.number, self.recorder)


class _ReplayDecoderRun(DecoderRun):
    def __init__(self, number: int, recorder: Recorder) -> None:
        self.number, self.recorder = number, recorder

    def before_layer(
        self, layer: int, hidden: Tensor, sequence: SequenceView, scoring: ScoringLayer
    ) -> KeepDecision | None:
        return self.recorder.keeps.get((self.number, layer))


@dataclass(frozen=True)
class Nothing(Method):
    """A plan without stages: what the engine costs by being there."""

    name: ClassVar[str] = "bench-nothing"

    def plan(self, facts: ModelFacts) -> Plan:
        return Plan()


# --------------------------------------------------------------------------- measuring


def measure_methods(
    wanted: list[str], repeats: int, size: Shape, clock: str = "wall"
) -> dict[str, Any]:
    """Interleaved prefill times of every method, its replay, its bare loop, and no method."""
    model = random_model(size)
    inputs = prompt(model, encode(model), TEXT, batch_size=1)
    layers = size.text_layers

    def forward() -> Any:
        return model(**inputs, use_cache=True, logits_to_keep=1)

    rows: list[dict[str, Any]] = []
    runs: dict[tuple[str, str], Callable[[], AbstractContextManager[Any]]] = {
        ("none", "unpruned"): nullcontext,
        ("none", "engine"): lambda: tokprune.compress(model, Nothing()),
        ("none", "everything"): lambda: tokprune.compress(model, "random", keep=1.0),
        ("none", "bare"): lambda: shortened(model, full),
    }
    with torch.inference_mode():
        full = observe(model, inputs)
        for label in wanted:
            method, recorder = method_of(label, layers), Recorder()
            with tokprune.compress(model, Instrumented(method, recorder)) as trace:
                forward()
            assert trace.last is not None
            lengths, replay = observe(model, inputs, method), Replay(method, recorder)
            again = replace(observe(model, inputs, replay), cached=lengths.cached)
            if again != lengths:
                raise RuntimeError(
                    f"{label}: the replay's lengths {again} are not the method's {lengths}"
                )
            visual = [sum(layer.counts[0]) for layer in trace.last.layers]
            runs[label, "method"] = partial(tokprune.compress, model, method)
            runs[label, "replay"] = partial(tokprune.compress, model, replay)
            runs[label, "bare"] = partial(shortened, model, lengths)
            rows.append(
                {
                    "label": label,
                    "method": repr(method),
                    "encoder_rows": [mlp for _, mlp in lengths.encoder],
                    "visual_tokens": visual,
                    "kept": visual[-1],
                    "mean_visual_tokens": sum(visual) / len(visual),
                }
            )
        times = _rounds(forward, runs, repeats, clock)
    unpruned = times["none", "unpruned"]
    for row in rows:
        whole_s, replay_s, bare_s = (times[row["label"], k] for k in ("method", "replay", "bare"))
        row |= {
            "method_s": Spread.of(whole_s).to_dict(),
            "replay_s": Spread.of(replay_s).to_dict(),
            "bare_s": Spread.of(bare_s).to_dict(),
            "scoring_s": _difference(whole_s, replay_s),
            "added_s": _difference(whole_s, bare_s),
            "speedup": Spread.of([u / m for u, m in zip(unpruned, whole_s)]).to_dict(),
            "ideal_speedup": Spread.of([u / r for u, r in zip(unpruned, replay_s)]).to_dict(),
            "achieved": Spread.of([r / m for r, m in zip(replay_s, whole_s)]).to_dict(),
        }
    return {
        "model": {
            "size": vars(size),
            "parameters": sum(p.numel() for p in model.parameters()),
            "prompt_tokens": int(inputs["input_ids"].shape[1]),
            "rounds": repeats,
        },
        "unpruned_s": Spread.of(unpruned).to_dict(),
        "engine_s": Spread.of(times["none", "engine"]).to_dict(),
        "bare_unpruned_s": Spread.of(times["none", "bare"]).to_dict(),
        "engine_added_s": _difference(times["none", "engine"], unpruned),
        "everything_added_s": _difference(times["none", "everything"], unpruned),
        "rows": rows,
    }


def _rounds(
    forward: Callable[[], Any],
    runs: dict[tuple[str, str], Callable[[], AbstractContextManager[Any]]],
    repeats: int,
    clock: str,
) -> dict[tuple[str, str], list[float]]:
    """Every run once a round: the runs of one label side by side, labels and runs in random
    order. Patching itself is not timed. The first round warms up and is thrown away."""
    rng = random.Random(0)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    own: dict[str, list[tuple[str, str]]] = {}
    for key in runs:
        own.setdefault(key[0], []).append(key)
    blocks = list(own)
    for number in range(repeats + 1):
        rng.shuffle(blocks)
        order = [key for label in blocks for key in rng.sample(own[label], len(own[label]))]
        for key in order:
            with no_garbage_collection(), runs[key]():
                seconds = once(forward, clock=clock)
            if number:
                times[key].append(seconds)
        print(f"  round {number} of {repeats}", file=sys.stderr, flush=True)
    return times


def _difference(a: list[float], b: list[float]) -> dict[str, Any]:
    """a − b round by round; ``noise``: its quartiles enclose zero."""
    spread = Spread.of([x - y for x, y in zip(a, b)])
    return {**spread.to_dict(), "noise": spread.q1 <= 0 <= spread.q3}


def method_tables(report: dict[str, Any]) -> list[Any]:
    from rich import box
    from rich.table import Table

    size, base = report["model"]["size"], report["unpruned_s"]
    table = Table(
        title="methods, one prefill, milliseconds: median (quartiles of differences)",
        box=box.SIMPLE_HEAD,
        title_justify="left",
    )
    table.add_column("method", no_wrap=True)
    heads = ("tokens\nlast/mean", "method", "replay", "bare", "added by scoring\nmethod − replay",
             "added in all\nmethod − bare", "speed\n-up", "replay's\nspeed-up",
             "replay ÷\nmethod")  # fmt: skip
    for name in heads:
        table.add_column(name, justify="right", no_wrap=True)
    for row in report["rows"]:
        table.add_row(
            row["label"], f"{row['kept']}/{row['mean_visual_tokens']:.0f}",
            *(milliseconds(row[name]["median"]) for name in ("method_s", "replay_s", "bare_s")),
            _signed(row["scoring_s"]), _signed(row["added_s"]),
            f"{row['speedup']['median']:.2f}×", f"{row['ideal_speedup']['median']:.2f}×",
            f"{100 * row['achieved']['median']:.0f} %",
        )  # fmt: skip
    model, bare = report["model"], report["bare_unpruned_s"]
    million = model["parameters"] / 1e6
    lines = (
        f"LLaVA, random weights: CLIP {size['vision_layers']}×{size['vision_width']}, Llama "
        f"{size['text_layers']}×{size['text_width']}, {million:.0f} M parameters; "
        f"{model['prompt_tokens']} tokens, {model['rounds']} rounds.\n"
        f"Unpruned {milliseconds(base['median'])} ms. The engine, patched in without a method, "
        f"adds {_signed(report['engine_added_s'])}; with one that keeps everything "
        f"{_signed(report['everything_added_s'])}.\nBare at full length: "
        f"{milliseconds(bare['median'])}.\n"
        "Replay: the same drops from recorded indices, no scoring. Bare: the model's layers on "
        "sequences of\nthat length (tokprune.bench.ideal), no method work. "
        "~: within noise, the quartiles enclose zero."
    )
    return [table, lines]


def _signed(value: dict[str, Any]) -> str:
    low, high = (milliseconds(value[name]) for name in ("q1", "q3"))
    text = f"{milliseconds(value['median'])} ({low}…{high})"
    return f"{text} ~" if value["noise"] else text
