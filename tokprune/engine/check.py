"""Contracts at the border: what a method hands to the engine is checked before it is used.

Types, shapes, dtypes and counts are checked always, on the host, without a look at any tensor's
values. The values (masks that sum to their counts, rows in range, each once, finite features) are
checked under ``validate=True`` only: that reads from the device, which no compiled graph can.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, get_args

import torch
from torch import Tensor

from tokprune.engine.contracts import (
    CachePolicy,
    DecoderRun,
    DecoderStage,
    EncoderOutcome,
    EncoderRun,
    EncoderStage,
    ImageTokens,
    KeepDecision,
    ModelFacts,
    Order,
    Plan,
    Positions,
    PromptStage,
    Reduction,
    Selection,
    SequenceView,
    TowerFacts,
    TowerTokens,
)
from tokprune.errors import ContractError

#: slots of a plan, and what stands in them
_SLOTS = {"encoder": EncoderStage, "prompt": PromptStage, "decoder": DecoderStage}

#: dtypes of answers; None: any floating one
_LONG, _BOOL, _FLOAT = torch.long, torch.bool, None

_validation = False


def set_validation(on: bool) -> bool:
    """Whether patches from now on check values where their caller does not say (at first: no);
    returns the earlier setting."""
    global _validation
    before, _validation = _validation, on
    return before


def check_plan(method: Any, plan: Any, facts: ModelFacts) -> Plan:
    """``plan`` as it is, if it is one that this model can run.

    Raises:
        ContractError: it is no plan, a stage stands in the wrong slot, a layer is not there.
    """
    where = f"{method!r}.plan()"
    _type(where, "its answer", plan, Plan)
    for slot, kind in _SLOTS.items():
        stages = getattr(plan, slot)
        if not isinstance(stages, tuple):
            _refuse(where, f"Plan.{slot}", f"is {_kind(stages)}", f"a tuple of {kind.__name__}")
        for stage in stages:
            _type(where, f"a stage in Plan.{slot}", stage, kind)
    for stage in plan.encoder:
        reads = bool(stage.between_layers or stage.after_layers or stage.bias_layers)
        fits = facts.packed if stage.reduces else facts.readable
        inside = stage.alters or ((stage.reduces or reads) and not (stage.packs and fits))
        tower = facts.need_tower(repr(method), whole=inside)
        own, layers = f"{where}, encoder stage {_name(stage)}", tower.encoder_layers
        for name in ("taps", "bias_layers", "activation_layers"):
            _layers(own, stage, name, layers, "encoder")
        _extra(own, stage, tower)
        for name in ("between_layers", "after_layers"):
            # rows that go after the features were taken would be counted, and still be there
            feature = tower.feature_layer
            last = layers if feature is None or not stage.reduces else feature + 1
            _layers(own, stage, name, last, "encoder")
        if stage.after_tower not in (None, tower.feature_layer):
            _refuse(own, "after_tower", f"is {stage.after_tower!r}",
                    f"{tower.feature_layer!r}, the layer that the model reads")  # fmt: skip
        _word(own, "positions", stage.positions, Positions)
        _word(own, "order", stage.order, Order)
    for stage in plan.prompt:
        _word(f"{where}, prompt stage {_name(stage)}", "positions", stage.positions, Positions)
    for stage in plan.decoder:
        _has_attention(method, stage, facts)
        for name in ("taps", "transition_layers", "prune_before"):
            own = f"{where}, decoder stage {_name(stage)}"
            _layers(own, stage, name, facts.decoder_layers, "decoder")
    return plan  # type: ignore[no-any-return]


def _has_attention(method: Any, stage: DecoderStage, facts: ModelFacts) -> None:
    """The layers whose attention ranks have one.

    Raises:
        ValueError: they are linear attention; names the layers that do.
    """
    if facts.attention_layers is None:
        return
    for layer in sorted({*stage.taps, *stage.ahead}):
        if layer not in facts.attention_layers:
            before = layer + (layer in stage.taps)
            known = sorted(n + (layer in stage.taps) for n in facts.attention_layers)
            raise ValueError(
                f"{method!r} ranks by the attention of decoder layer {layer}, which is linear and "
                f"has none; prune_before={before} should be one of {', '.join(map(str, known))}"
            )


@dataclass(frozen=True)
class Contracts:
    """The checks of one patch.

    All methods raise :class:`~tokprune.errors.ContractError`, whose text names the method, its
    stage, the value and what would be right.
    """

    #: the configuration at work, for the texts
    method: str = "a method"
    #: check values, too
    validate: bool = False

    @classmethod
    def of(cls, method: str, validate: bool | None) -> Contracts:
        """``validate`` None: as :func:`set_validation` says."""
        return cls(method, _validation if validate is None else validate)

    @property
    def looks(self) -> bool:
        """Whether values are checked here. In a graph of ``torch.compile`` there are none to look
        at, and to ask for them would break it."""
        return self.validate and not torch.compiler.is_compiling()

    def run(self, stage: EncoderStage | DecoderStage, run: Any) -> Any:
        """What a stage starts for one forward: a run of its kind, handed back."""
        encoder = isinstance(stage, EncoderStage)
        where = f"{self.method}, {'encoder' if encoder else 'decoder'} stage {_name(stage)}.start()"
        _type(where, "its answer", run, EncoderRun if encoder else DecoderRun)
        return run

    # ------------------------------------------------------------------ vision encoder

    def bias(self, run: EncoderRun, layer: int, bias: Tensor | None, tokens: TowerTokens) -> None:
        if bias is not None:
            where = f"{self.method}, {_name(run)}.bias() of encoder layer {layer}"
            tiles = tokens.slots.shape[0]
            # one row of bias may serve all tiles
            batch = 1 if isinstance(bias, Tensor) and bias.shape[:1] == (1,) else tiles
            _tensor(where, "the bias", bias, (batch, 1, 1, tokens.rows), _FLOAT)

    def activation(self, run: EncoderRun, layer: int, new: Tensor, old: Tensor) -> None:
        where = f"{self.method}, {_name(run)}.activation() of encoder layer {layer}"
        _tensor(where, "its answer", new, tuple(old.shape), old.dtype)

    def reduction(
        self, run: EncoderRun, hook: str, layer: int, reduction: Reduction, hidden: Tensor,
        tokens: TowerTokens,
    ) -> None:  # fmt: skip
        where = f"{self.method}, {_name(run)}.{hook}() of encoder layer {layer}"
        _type(where, "its answer", reduction, Reduction)
        tiles, old = tokens.slots.shape
        rows, counts = reduction.rows, reduction.counts
        _tensor(where, "Reduction.rows", rows, (tiles, "T'"), _LONG)
        new = rows.shape[1]
        if reduction.hidden is not None:
            shape = (tiles, new, hidden.shape[2])
            _tensor(where, "Reduction.hidden", reduction.hidden, shape, hidden.dtype)
        if reduction.group is not None:
            _tensor(where, "Reduction.group", reduction.group, (tiles, old), _LONG)
        if counts is not None:
            _counts(where, "Reduction.counts", counts, [new] * tiles, "tile")
        if self.looks:
            real = rows >= 0
            if counts is None and not bool(real.all()):
                _refuse(where, "Reduction.rows", "holds −1 (padding), and Reduction.counts is None",
                        "given with counts, the real rows of every tile")  # fmt: skip
            _inside(where, "Reduction.rows", rows, -1, old)
            if counts is not None:
                _sums(where, "Reduction.counts", counts, real.sum(1).tolist(), "rows ≥ 0")
                if not bool((real[:, :-1] | ~real[:, 1:]).all()):
                    _refuse(where, "Reduction.rows", "has padding (−1) before real rows",
                            "padded at the end")  # fmt: skip
            if tokens.has_cls and not bool((rows[:, 0] == 0).all()):
                _refuse(where, "Reduction.rows", f"starts with {rows[:, 0].tolist()}",
                        "[:, 0] = 0 in every tile: the class token stays first")  # fmt: skip
            if reduction.group is not None:
                _inside(where, "Reduction.group", reduction.group, -1, new)
            if reduction.hidden is not None:
                _finite(where, "Reduction.hidden", reduction.hidden[real], hidden)

    def outcome(
        self, run: EncoderRun, outcome: EncoderOutcome, tokens: TowerTokens, facts: TowerFacts
    ) -> EncoderOutcome:
        where = f"{self.method}, {_name(run)}.finish()"
        _type(where, "its answer", outcome, EncoderOutcome)
        tiles, patches = tokens.slots.shape[0], tokens.rows - tokens.first_patch
        if outcome.score is not None:
            _tensor(where, "EncoderOutcome.score", outcome.score, (tiles, patches), _FLOAT)
        if outcome.tag is not None:
            _tensor(where, "EncoderOutcome.tag", outcome.tag, (tiles, patches), _BOOL)
        if outcome.key is not None:
            shape = (tiles, patches + int(facts.cls_in_features))
            _tensor(where, "EncoderOutcome.key", outcome.key, shape, _LONG)
        return outcome

    # ------------------------------------------------------------------ language-model input

    def selections(
        self, stage: PromptStage, answers: Sequence[Selection | None], images: list[ImageTokens]
    ) -> None:
        where = f"{self.method}, prompt stage {_name(stage)}.select()"
        if not isinstance(answers, list | tuple):
            _refuse(where, "its answer", f"is {_kind(answers)}",
                    "a list of one Selection or None per image")  # fmt: skip
        if len(answers) != len(images):
            _refuse(where, "its answer", f"has {len(answers)} entries",
                    f"a list of {len(images)}: one Selection or None per image")  # fmt: skip
        for number, (answer, image) in enumerate(zip(answers, images)):
            if answer is not None:
                self._selection(f"{where}, image {number}", answer, image)

    def _selection(self, where: str, answer: Selection, image: ImageTokens) -> None:
        _type(where, "its answer", answer, Selection)
        index, features, group = answer.index, answer.features, answer.group
        _tensor(where, "Selection.index", index, ("k",), _LONG)
        kept = index.shape[0]
        if features is not None:
            shape = (kept, image.features.shape[1])
            _tensor(where, "Selection.features", features, shape, _FLOAT)
        if group is not None:
            _tensor(where, "Selection.group", group, (image.count,), _LONG)
        if self.looks:
            _inside(where, "Selection.index", index, 0, image.count)
            if features is None:  # a merged token may stand anywhere
                _once(where, "Selection.index", index)
            else:
                _finite(where, "Selection.features", features, image.features)
            if group is not None:
                _inside(where, "Selection.group", group, -1, kept)

    # ------------------------------------------------------------------ decoder

    def keep_decision(
        self, run: DecoderRun, layer: int, keep: KeepDecision, hidden: Tensor,
        sequence: SequenceView,
    ) -> None:  # fmt: skip
        where = f"{self.method}, {_name(run)}.before_layer() of decoder layer {layer}"
        _type(where, "its answer", keep, KeepDecision)
        shape = tuple(sequence.column.shape)
        _tensor(where, "KeepDecision.mask", keep.mask, shape, _BOOL)
        if keep.counts is not None:
            _rows(where, "KeepDecision.counts", keep.counts, len(sequence.counts), "batch row")
            for row, (own, now) in enumerate(zip(keep.counts, sequence.counts)):
                _counts(where, f"KeepDecision.counts[{row}]", own, now, "image")
        _word(where, "KeepDecision.positions", keep.positions, Positions)
        if keep.hidden is not None:
            _tensor(where, "KeepDecision.hidden", keep.hidden, tuple(hidden.shape), hidden.dtype)
        for name in ("order", "group"):
            if (value := getattr(keep, name)) is not None:
                _tensor(where, f"KeepDecision.{name}", value, shape, _LONG)
        if self.looks:
            self._keep_values(where, keep, hidden, sequence)

    def _keep_values(
        self, where: str, keep: KeepDecision, hidden: Tensor, sequence: SequenceView
    ) -> None:
        if keep.counts is not None:
            for row, counts in enumerate(keep.counts):
                staying = sequence.segment[row][keep.mask[row]]
                found = [int((staying == image).sum()) for image in range(len(counts))]
                _sums(where, f"KeepDecision.counts[{row}]", counts, found, "True in its mask")
        stays = sequence.valid & (keep.mask | ~sequence.visual)
        if keep.order is not None and bool((keep.order[stays] < 0).any()):
            _refuse(where, "KeepDecision.order", "is negative where a token stays",
                    "a sort key ≥ 0")  # fmt: skip
        if keep.group is not None:
            _inside(where, "KeepDecision.group", keep.group, -1, keep.group.shape[1])
            lost = (keep.group >= 0) & ~stays.gather(1, keep.group.clamp(min=0)) & sequence.valid
            if bool(lost.any()):
                _refuse(where, "KeepDecision.group", "names places that do not stay",
                        "the place of a token that stays, or −1 for a dropped one")  # fmt: skip
        if keep.hidden is not None:
            _finite(where, "KeepDecision.hidden", keep.hidden[stays], hidden[sequence.valid])

    def cache_policy(
        self, run: DecoderRun, policy: CachePolicy, sequences: Sequence[SequenceView]
    ) -> None:
        where = f"{self.method}, {_name(run)}.after_prefill()"
        _type(where, "its answer", policy, CachePolicy)
        for name in ("index", "lengths"):
            for layer in getattr(policy, name):
                if layer not in range(len(sequences)):
                    _refuse(where, f"CachePolicy.{name}", f"names decoder layer {layer!r}",
                            f"of layers 0 to {len(sequences) - 1}")  # fmt: skip
        for layer, index in policy.index.items():
            batch, old = sequences[layer].column.shape
            _tensor(where, f"CachePolicy.index[{layer}]", index, (batch, "n'"), _LONG)
            lengths = policy.lengths.get(layer)
            if lengths is not None:
                name, most = f"CachePolicy.lengths[{layer}]", [index.shape[1]] * batch
                _counts(where, name, lengths, most, "batch row")
            if self.looks:
                _inside(where, f"CachePolicy.index[{layer}]", index, -1, old)
                for row in index:
                    _once(where, f"CachePolicy.index[{layer}]", row[row >= 0])
                if lengths is not None:
                    found = (index >= 0).sum(1).tolist()
                    _sums(where, f"CachePolicy.lengths[{layer}]", lengths, found, "index ≥ 0")


#: for engine parts that run on their own, without a patch
UNNAMED = Contracts()


# ------------------------------------------------------------------ one check each


def _refuse(where: str, name: str, got: str, want: str) -> NoReturn:
    raise ContractError(f"{where}: {name} {got}; it should be {want}")


def _name(value: Any) -> str:
    return type(value).__name__


def _kind(value: Any) -> str:
    """A value in a few words, whatever its size."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    if isinstance(value, type):
        return f"the class {value.__name__} itself"
    text = repr(value)
    return text if len(text) <= 60 else f"a {_name(value)}"


def _type(where: str, name: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        _refuse(where, name, f"is {_kind(value)}", f"a {kind.__name__}")


def _word(where: str, name: str, value: Any, words: Any) -> None:
    if value not in get_args(words):
        _refuse(where, name, f"is {value!r}", " or ".join(map(repr, get_args(words))))


def _layers(where: str, stage: Any, name: str, layers: int, kind: str) -> None:
    """A stage's layer numbers are there; what stands elsewhere would silently never run."""
    value = getattr(stage, name)
    if not isinstance(value, frozenset | set | tuple | list):
        _refuse(where, name, f"is {_kind(value)}", f"a frozenset of {kind} layer numbers")
    for layer in value:
        if layer not in range(layers):
            _refuse(where, name, f"names layer {layer!r}",
                    f"in 0 to {layers - 1}, {kind} layers counted from 0")  # fmt: skip


def _extra(where: str, stage: EncoderStage, tower: TowerFacts) -> None:
    """Rows can be added, and there is a layer behind which they can be cut off again."""
    extra = stage.extra_tokens
    if not isinstance(extra, int) or extra < 0:
        _refuse(where, "extra_tokens", f"is {_kind(extra)}", "a number of rows, 0 or more")
    if extra and (tower.feature_layer is None or tower.feature_layer < 0):
        _refuse(where, "extra_tokens", f"is {extra}",
                "0: the model does not read one of its encoder's layers")  # fmt: skip


def _tensor(
    where: str, name: str, value: Any, shape: tuple[int | str, ...], dtype: torch.dtype | None
) -> None:
    """``value`` is a tensor of this shape (words stand for free sizes) and dtype."""
    if isinstance(value, Tensor):
        fits = len(shape) == value.dim() and all(
            isinstance(n, str) or n == size for n, size in zip(shape, value.shape)
        )
        if fits and (value.is_floating_point() if dtype is None else value.dtype == dtype):
            return
    want = f"a {dtype or 'floating'} tensor of shape [{', '.join(map(str, shape))}]"
    if dtype == torch.long and getattr(value, "dtype", None) == torch.bool:
        want += " (mask.nonzero().view(-1) makes row numbers of a mask)"
    _refuse(where, name, f"is {_kind(value)}", want)


def _rows(where: str, name: str, value: Any, number: int, what: str) -> None:
    if not isinstance(value, list | tuple) or len(value) != number:
        got = f"is {_kind(value)}" if not isinstance(value, list | tuple) else (
            f"has {len(value)} entries"
        )  # fmt: skip
        _refuse(where, name, got, f"a list of {number} entries, one per {what}")


def _counts(where: str, name: str, value: Any, most: Sequence[int], what: str) -> None:
    """A list of host integers, one for each entry of ``most``, which none exceeds."""
    _rows(where, name, value, len(most), what)
    for number, (n, limit) in enumerate(zip(value, most)):
        if not isinstance(n, int) or not 0 <= n <= limit:
            _refuse(where, f"{name}[{number}]", f"is {_kind(n)}", f"an int in 0 to {limit}")


def _sums(where: str, name: str, counts: Sequence[int], found: list[int], what: str) -> None:
    if list(counts) != found:
        _refuse(where, name, f"is {list(counts)}", f"{found}, the number of {what}")


def _inside(where: str, name: str, value: Tensor, low: int, end: int) -> None:
    if value.numel() and not bool(((value >= low) & (value < end)).all()):
        got = f"has values from {int(value.min())} to {int(value.max())}"
        _refuse(where, name, got, f"in {low} to {end - 1}")


def _once(where: str, name: str, index: Tensor) -> None:
    values, times = index.unique(return_counts=True)
    if len(values) != len(index):
        twice = values[times > 1].tolist()
        _refuse(where, name, f"repeats {twice[:5]}", "unique: each token at most once")


def _finite(where: str, name: str, value: Tensor, source: Tensor) -> None:
    """NaN or infinite values that were not in what the method was given."""
    if not bool(value.isfinite().all()) and bool(source.isfinite().all()):
        _refuse(where, name, "holds NaN or infinite values", "finite, as what it was made of is")
