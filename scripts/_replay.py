"""The methods section of the benchmark: a method, its replay without scoring, and a bare loop."""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import demo_model
import torch
from _measure import Spread, milliseconds, once
from torch import Tensor

import tokprune
from tokprune.engine.stages import (
    Attention,
    CachePolicy,
    DecoderRun,
    DecoderStage,
    EncoderOutcome,
    EncoderRun,
    EncoderStage,
    ImageTokens,
    Keep,
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
from tokprune.families import family_of
from tokprune.methods import Method, available_methods, make_method
from tokprune.trace import PrefillTrace

KEEP = 64
FULL = demo_model.Size(12, 384, 1536, 6, 8, 384, 1024, 6, 6)
QUICK = demo_model.Size(12, 96, 256, 4, 8, 96, 256, 4, 4)
PREFIX, SUFFIX = 35, 29

#: further settings worth a row of their own: label → (method, options beside the budget)
_EXTRA: dict[str, tuple[str, dict[str, Any]]] = {
    "todre (k-center)": ("todre", {"select": "k_center"}),
    "transprune (TTV only)": ("transprune", {"alpha": 1.0}),
}


def labels() -> list[str]:
    """Every registered method, and the further settings of those there are."""
    names = list(available_methods())
    return sorted([*names, *(label for label, (name, _) in _EXTRA.items() if name in names)])


def method_of(label: str, decoder_layers: int) -> Method:
    name, changes = _EXTRA.get(label, (label, {}))
    return make_method(name, **{**demo_model.comparable(name, decoder_layers, KEEP), **changes})


# -------------------------------------------------------------------------------- tape


@dataclass
class Tape:
    """What a method decided in one prefill, by stage number."""

    rows: dict[tuple[int, str, int], Reduction] = field(default_factory=dict)
    outcomes: dict[int, EncoderOutcome] = field(default_factory=dict)
    selections: dict[int, list[Selection | None]] = field(default_factory=dict)
    keeps: dict[tuple[int, int], Keep] = field(default_factory=dict)


@dataclass(frozen=True)
class Recorder(Method):
    """Runs a method and writes every choice of rows to a tape."""

    name: ClassVar[str] = "bench-recorder"
    inner: Method
    tape: Tape

    def plan(self, facts: ModelFacts) -> Plan:
        plan = self.inner.plan(facts)
        return Plan(
            encoder=tuple(_RecordEncoder(i, s, self.tape) for i, s in enumerate(plan.encoder)),
            prompt=tuple(_RecordPrompt(i, s, self.tape) for i, s in enumerate(plan.prompt)),
            decoder=tuple(_RecordDecoder(i, s, self.tape) for i, s in enumerate(plan.decoder)),
        )


class _RecordEncoder(EncoderStage):
    def __init__(self, number: int, inner: EncoderStage, tape: Tape) -> None:
        self.number, self.inner, self.tape = number, inner, tape
        self.taps, self.bias_layers = inner.taps, inner.bias_layers
        self.between_layers, self.after_layers = inner.between_layers, inner.after_layers
        self.order, self.positions = inner.order, inner.positions

    def start(self, tower: TowerInput) -> EncoderRun:
        return _RecordEncoderRun(self.number, self.inner.start(tower), self.tape)


class _RecordEncoderRun(EncoderRun):
    def __init__(self, number: int, inner: EncoderRun, tape: Tape) -> None:
        self.number, self.inner, self.tape = number, inner, tape

    def attention(self, layer: int, attention: Attention, tokens: TowerTokens) -> None:
        self.inner.attention(layer, attention, tokens)

    def bias(self, layer: int, tokens: TowerTokens) -> Tensor | None:
        return self.inner.bias(layer, tokens)

    def between(self, layer: int, hidden: Tensor, tokens: TowerTokens) -> Reduction | None:
        return self._keep("between", layer, self.inner.between(layer, hidden, tokens))

    def after(self, layer: int, hidden: Tensor, tokens: TowerTokens) -> Reduction | None:
        return self._keep("after", layer, self.inner.after(layer, hidden, tokens))

    def _keep(self, place: str, layer: int, reduction: Reduction | None) -> Reduction | None:
        if reduction is not None:
            rows = Reduction(reduction.rows.clone(), counts=reduction.counts)
            self.tape.rows[self.number, place, layer] = rows
        return reduction

    def finish(self, tokens: TowerTokens) -> EncoderOutcome:
        outcome = self.inner.finish(tokens)
        self.tape.outcomes[self.number] = EncoderOutcome(key=outcome.key, unpad=outcome.unpad)
        return outcome


class _RecordPrompt(PromptStage):
    def __init__(self, number: int, inner: PromptStage, tape: Tape) -> None:
        self.number, self.inner, self.tape = number, inner, tape
        self.positions = inner.positions
        self.wants_raw = getattr(inner, "wants_raw", False)

    def select(self, images: Sequence[ImageTokens]) -> list[Selection | None]:
        answers = self.inner.select(images)
        self.tape.selections[self.number] = [
            None if a is None else Selection(a.index.clone()) for a in answers
        ]
        return answers


class _RecordDecoder(DecoderStage):
    def __init__(self, number: int, inner: DecoderStage, tape: Tape) -> None:
        self.number, self.inner, self.tape = number, inner, tape
        self.taps, self.transition_layers = inner.taps, inner.transition_layers
        self.prune_layers, self.has_cache_policy = inner.prune_layers, inner.has_cache_policy

    def start(self) -> DecoderRun:
        return _RecordDecoderRun(self.number, self.inner.start(), self.tape)


class _RecordDecoderRun(DecoderRun):
    def __init__(self, number: int, inner: DecoderRun, tape: Tape) -> None:
        self.number, self.inner, self.tape = number, inner, tape
        self.transition = inner.transition  # type: ignore[method-assign]
        self.attention = inner.attention  # type: ignore[method-assign]
        self.dropped = inner.dropped  # type: ignore[method-assign]

    def before_layer(
        self, layer: int, hidden: Tensor, view: SequenceView, scoring: ScoringLayer
    ) -> Keep | None:
        keep = self.inner.before_layer(layer, hidden, view, scoring)
        if keep is not None:
            counts = [
                [int((keep.mask[b] & (view.segment[b] == s)).sum()) for s in range(len(row))]
                for b, row in enumerate(view.counts)
            ]
            self.tape.keeps[self.number, layer] = Keep(keep.mask.clone(), counts, keep.positions)
        return keep

    def after_prefill(self, views: Sequence[SequenceView]) -> CachePolicy | None:
        return self.inner.after_prefill(views)


# ------------------------------------------------------------------------------ replay


@dataclass(frozen=True)
class Replay(Method):
    """Drops what a tape says, where it says: gathers and the engine's book-keeping, no scoring.
    Merges are gathers of the rows that stand for the merged ones; caches are left alone."""

    name: ClassVar[str] = "bench-replay"
    inner: Method
    tape: Tape

    def plan(self, facts: ModelFacts) -> Plan:
        plan = self.inner.plan(facts)
        return Plan(
            encoder=tuple(
                _ReplayEncoder(i, s, self.tape) for i, s in enumerate(plan.encoder) if s.reduces
            ),
            prompt=tuple(_ReplayPrompt(i, s, self.tape) for i, s in enumerate(plan.prompt)),
            decoder=tuple(_ReplayDecoder(i, self.tape) for i in range(len(plan.decoder))),
        )


class _ReplayEncoder(EncoderStage):
    def __init__(self, number: int, inner: EncoderStage, tape: Tape) -> None:
        self.number, self.tape = number, tape
        own = [(place, layer) for n, place, layer in tape.rows if n == number]
        self.between_layers = frozenset(layer for place, layer in own if place == "between")
        self.after_layers = frozenset(layer for place, layer in own if place == "after")
        self.order, self.positions = inner.order, inner.positions

    def start(self, tower: TowerInput) -> EncoderRun:
        return _ReplayEncoderRun(self.number, self.tape)


class _ReplayEncoderRun(EncoderRun):
    def __init__(self, number: int, tape: Tape) -> None:
        self.number, self.tape = number, tape

    def between(self, layer: int, hidden: Tensor, tokens: TowerTokens) -> Reduction | None:
        return self.tape.rows.get((self.number, "between", layer))

    def after(self, layer: int, hidden: Tensor, tokens: TowerTokens) -> Reduction | None:
        return self.tape.rows.get((self.number, "after", layer))

    def finish(self, tokens: TowerTokens) -> EncoderOutcome:
        return self.tape.outcomes[self.number]


class _ReplayPrompt(PromptStage):
    def __init__(self, number: int, inner: PromptStage, tape: Tape) -> None:
        self.number, self.tape, self.positions = number, tape, inner.positions

    def select(self, images: Sequence[ImageTokens]) -> list[Selection | None]:
        return self.tape.selections[self.number]


class _ReplayDecoder(DecoderStage):
    def __init__(self, number: int, tape: Tape) -> None:
        self.number, self.tape = number, tape
        self.prune_layers = frozenset(layer for n, layer in tape.keeps if n == number)

    def start(self) -> DecoderRun:
        return _ReplayDecoderRun(self.number, self.tape)


class _ReplayDecoderRun(DecoderRun):
    def __init__(self, number: int, tape: Tape) -> None:
        self.number, self.tape = number, tape

    def before_layer(
        self, layer: int, hidden: Tensor, view: SequenceView, scoring: ScoringLayer
    ) -> Keep | None:
        return self.tape.keeps.get((self.number, layer))


@dataclass(frozen=True)
class Nothing(Method):
    """A plan without stages: what the engine costs by being there."""

    name: ClassVar[str] = "bench-nothing"

    def plan(self, facts: ModelFacts) -> Plan:
        return Plan()


# -------------------------------------------------------------------------------- bare


@dataclass(frozen=True)
class Lengths:
    """Rows per place of one prefill of one image. ``encoder``: (attention, MLP) rows per layer,
    class token included; ``projected``: rows through the projector; ``visual``: rows that enter
    the decoder; ``decoder``: all tokens per layer."""

    encoder: tuple[tuple[int, int], ...]
    projected: int
    visual: int
    decoder: tuple[int, ...]

    @classmethod
    def of(cls, prefill: PrefillTrace) -> Lengths:
        record = prefill.images[0].record
        assert record is not None
        rows = prefill.tower_rows(record)
        text = prefill.original_lengths[0] - prefill.original_counts[0]
        decoder = tuple(layer.lengths[0] for layer in prefill.layers)
        patches = prefill.tower_output(record)[0] - int(prefill.facts.has_cls)
        return cls(
            encoder=tuple((attention[0], mlp[0]) for attention, mlp in rows),
            projected=max(patches, decoder[0] - text),  # VisionZip's class token comes on top
            visual=decoder[0] - text,
            decoder=decoder,
        )


class BareForward:
    """One prefill over the model's own layers, cut to given lengths by slicing (views).

    Which rows survive does not matter for time, so the first ones do; text lies behind them. At
    full lengths this gives the model's logits.
    """

    def __init__(self, model: Any, inputs: dict[str, Tensor], lengths: Lengths) -> None:
        self.model, self.lengths = model, lengths
        self.pixels, self.ids = inputs["pixel_values"], inputs["input_ids"]
        family = family_of(model)
        self.parts = family.parts(model)
        self.feature = family.facts(model, self.parts).feature_layer
        visual = (self.ids[0] == self.parts.image_token_id).nonzero()[:, 0]
        self.begin, self.end = int(visual[0]), int(visual[-1]) + 1

    def __call__(self) -> Tensor:
        parts, lengths = self.parts, self.lengths
        vision = getattr(parts.tower, "vision_model", parts.tower)
        x = vision.pre_layrnorm(vision.embeddings(self.pixels))
        features = x
        for number, (layer, (rows, mlp)) in enumerate(zip(parts.encoder_layers, lengths.encoder)):
            x = x[:, :rows]
            x = (x + layer.self_attn(layer.layer_norm1(x), attention_mask=None)[0])[:, :mlp]
            x = x + layer.mlp(layer.layer_norm2(x))
            if number == self.feature:
                features = x
        projected = parts.projector(features[:, -lengths.projected :])
        text = parts.language_model.embed_tokens(
            torch.cat([self.ids[:, : self.begin], self.ids[:, self.end :]], dim=1)
        )
        seen = projected[:, : lengths.visual]
        h = torch.cat([text[:, : self.begin], seen, text[:, self.begin :]], dim=1)
        cache = _new_cache(self.model)
        position: Any = None
        for layer, length in zip(parts.decoder_layers, lengths.decoder):
            h = h[:, -length:]
            if position is None or position.shape[1] != length:
                position = torch.arange(length)[None]
                rotary = parts.rotary(h, position)
            out = layer(
                h, attention_mask=None, position_ids=position, past_key_values=cache,
                use_cache=True, position_embeddings=rotary,
            )  # fmt: skip
            h = out[0] if isinstance(out, tuple) else out
        return self.model.lm_head(parts.language_model.norm(h[:, -1:]))


def _new_cache(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config.get_text_config())


# --------------------------------------------------------------------------- measuring


def measure_methods(
    wanted: list[str], repeats: int, quick: bool, clock: str = "wall"
) -> dict[str, Any]:
    """Interleaved prefill times of every method, its replay, its bare loop, and no method."""
    size = QUICK if quick else FULL
    model = demo_model.build(size)
    inputs = example_inputs()
    layers = size.text_layers

    def forward() -> Any:
        return model(**inputs, use_cache=True, logits_to_keep=1)

    rows: list[dict[str, Any]] = []
    runs: dict[tuple[str, str], tuple[Method | None, Callable[[], Any]]] = {}
    with torch.inference_mode():
        logits = forward().logits
        with tokprune.compress(model, Nothing()) as trace:
            forward()
        assert trace.last is not None
        whole = BareForward(model, inputs, Lengths.of(trace.last))
        if not torch.allclose(whole()[:, -1], logits[:, -1], atol=1e-3, rtol=1e-3):
            raise RuntimeError("the bare loop does not give the model's logits")
        runs["none", "unpruned"] = (None, forward)
        runs["none", "engine"] = (Nothing(), forward)
        runs["none", "bare"] = (None, whole)
        for label in wanted:
            method, tape = method_of(label, layers), Tape()
            with tokprune.compress(model, Recorder(method, tape)) as trace:
                forward()
            assert trace.last is not None
            lengths = Lengths.of(trace.last)
            replay = Replay(method, tape)
            with tokprune.compress(model, replay) as again:
                forward()
            assert again.last is not None
            if Lengths.of(again.last) != lengths:
                raise RuntimeError(
                    f"{label}: the replay's lengths {Lengths.of(again.last)} are not the method's "
                    f"{lengths}"
                )
            visual = [sum(layer.counts[0]) for layer in trace.last.layers]
            runs[label, "method"] = (method, forward)
            runs[label, "replay"] = (replay, forward)
            runs[label, "bare"] = (None, BareForward(model, inputs, lengths))
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
        times = _rounds(model, runs, repeats, clock)
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
        "rows": rows,
    }


def example_inputs() -> dict[str, Tensor]:
    """A prompt of 35 + 576 + 29 tokens and one random image."""
    generator = torch.Generator().manual_seed(1)
    vocab = demo_model.vocabulary()
    image = vocab["<image>"]

    def text(count: int) -> Tensor:
        return torch.randint(image + 1, len(vocab), (1, count), generator=generator)

    block = torch.full((1, demo_model.GRID**2), image)
    ids = torch.cat([text(PREFIX), block, text(SUFFIX)], dim=1)
    coarse = torch.randn(1, 3, 12, 12, generator=generator)
    side = demo_model.SIDE
    pixels = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")
    pixels = pixels + 0.2 * torch.randn(pixels.shape, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def _rounds(
    model: Any,
    runs: dict[tuple[str, str], tuple[Method | None, Callable[[], Any]]],
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
            method, function = runs[key]
            gc.collect()
            gc.disable()
            try:
                if method is None:
                    seconds = once(function, clock=clock)
                else:
                    with tokprune.compress(model, method):
                        seconds = once(function, clock=clock)
            finally:
                gc.enable()
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
        f"adds {_signed(report['engine_added_s'])}. Bare loop at full length: "
        f"{milliseconds(bare['median'])}.\n"
        "Replay: the same drops from recorded indices, no scoring. Bare: the model's layers on "
        "sequences of\nthat length, no hooks. ~: within noise, the quartiles enclose zero."
    )
    return [table, lines]


def _signed(value: dict[str, Any]) -> str:
    low, high = (milliseconds(value[name]) for name in ("q1", "q3"))
    text = f"{milliseconds(value['median'])} ({low}…{high})"
    return f"{text} ~" if value["noise"] else text
