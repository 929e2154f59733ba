"""Rows and activations that a stage adds to, or changes in, the vision encoder: the engine's side,
against unpatched models with plain hooks on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from reference.registers import chosen_rows, register_in_tower
from tiny import llava, llava_next, llava_next_video, make_inputs
from torch import Tensor

import tokprune
from tokprune.engine.contracts import (
    ADDED,
    EncoderRun,
    EncoderStage,
    Plan,
    Reduction,
    TowerTokens,
)
from tokprune.engine.shared_encoder import SharedEncoder
from tokprune.errors import ContractError
from tokprune.families import bind
from tokprune.methods import Method
from tokprune.operators.occamtoken import shift

NEURONS = ((0, 3), (1, 17), (1, 7))
PATCHES, LAYERS = 36, 6


@dataclass(frozen=True)
class Registers(Method):
    """Registers that take over what some neurons do, and are not kept."""

    name: ClassVar[str] = "registers"
    extra: Any = 1
    #: "engine": cut off by the engine; "late": by the engine, once the last layer has run; "own":
    #: by the stage; "widen": activations of another shape
    cut: str = "engine"
    share: str | None = None

    def plan(self, facts: Any) -> Plan:
        return Plan(encoder=(_Stage(self, facts.tower.feature_layer),))


class _Stage(EncoderStage):
    def __init__(self, method: Registers, read: int) -> None:
        self.method, self.extra_tokens = method, method.extra
        self.activation_layers = frozenset({0, 1})
        self.after_tower = read if method.cut == "late" else None
        self.after_layers = frozenset({read}) if method.cut == "own" else frozenset()

    @property
    def share_key(self) -> Any:
        return self.method.share

    def start(self, tower: Any) -> EncoderRun:
        return _Run(self.method)


class _Run(EncoderRun):
    def __init__(self, method: Registers) -> None:
        self.method = method

    def activation(self, layer: int, activations: Tensor, tokens: TowerTokens) -> Tensor:
        assert (tokens.slots == ADDED).sum(1).tolist() == [self.method.extra] * len(activations)
        if self.method.cut == "widen":
            return activations[:, :-1]
        own = [channel for at, channel in NEURONS if at == layer]
        # of several rows the last one is the register
        many = self.method.extra - 1
        if not many:
            return shift(activations, own, tokens.has_cls)
        n = activations.shape[1] - 1 - many
        new = shift(torch.cat([activations[:, :n], activations[:, -1:]], 1), own, tokens.has_cls)
        return torch.cat([new[:, :n], activations[:, n:-1], new[:, -1:]], dim=1)

    def after(self, layer: int, hidden: Tensor, tokens: TowerTokens) -> Reduction | None:
        if self.method.cut == "late":
            return None
        rows = torch.arange(hidden.shape[1] - self.method.extra)
        return Reduction(rows.expand(len(hidden), -1))


def reference(model: Any, inputs: dict[str, Tensor], tiles: int) -> Tensor:
    facts = bind(model).facts.tower
    rows = torch.ones(tiles, facts.tokens_per_tile + 1, dtype=torch.bool)
    rows[:, -1] = False
    with torch.no_grad(), register_in_tower(model, NEURONS, facts.has_cls):
        with chosen_rows(model, rows):
            return model(**inputs).logits


def compressed(model: Any, inputs: dict[str, Tensor], method: Method) -> Tensor:
    with torch.no_grad(), tokprune.compress(model, method, validate=True) as trace:
        logits = model(**inputs).logits
    assert trace.last.layers[0].counts == [[n] for n in counts_of(model, inputs)]
    return logits


def counts_of(model: Any, inputs: dict[str, Tensor]) -> list[int]:
    visual = bind(model).parts.visual(inputs["input_ids"])
    return visual.sum(1).tolist()


def same(got: Tensor, want: Tensor) -> bool:
    return torch.allclose(got, want, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("cut", ["engine", "late", "own"])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_what_nothing_keeps_is_cut_off_again(tower: str, cut: str) -> None:
    model = llava(tower=tower)
    inputs = make_inputs(model, [[4, "image", 6], [4, "image", 6]])
    got = compressed(model, inputs, Registers(cut=cut))
    assert same(got, reference(model, inputs, 2))
    with torch.no_grad():
        assert not same(got, model(**inputs).logits), "the register does nothing"


def test_tiles_and_class_tokens_of_the_model_stay_in_place() -> None:
    model = llava_next()
    inputs = make_inputs(model, [[4, "image", 6]], [(20, 40)])
    assert same(compressed(model, inputs, Registers()), reference(model, inputs, 3))


def test_the_class_token_may_be_kept_by_the_model() -> None:
    model = llava()
    model.config.vision_feature_select_strategy = "full"
    inputs = make_inputs(model, [[4, "image", 6]])
    image = inputs["input_ids"] == bind(model).parts.image_token_id
    assert int(image.sum()) == PATCHES + 1
    assert same(compressed(model, inputs, Registers()), reference(model, inputs, 1))
    method = tokprune.OccamToken(lambda1=0.0, lambda2=0.0, neurons=NEURONS)
    with torch.no_grad(), tokprune.compress(model, method, validate=True) as trace:
        model(**inputs)
    assert trace.last.layers[0].counts == [[PATCHES + 2]]


def test_frames_are_pooled_without_it() -> None:
    model = llava_next_video()
    inputs = make_inputs(model, [[4, "video", 6]])
    handle = model.model.vision_resampler.register_forward_pre_hook(
        lambda module, args: (args[0][:, :PATCHES],)
    )
    with torch.no_grad(), register_in_tower(model, NEURONS):
        want = model(**inputs).logits
    handle.remove()
    assert same(compressed(model, inputs, Registers()), want)


def test_several_rows() -> None:
    model = llava()
    inputs = make_inputs(model, [[4, "image", 6]])
    two = compressed(model, inputs, Registers(extra=2))
    assert not same(two, compressed(model, inputs, Registers(extra=1)))
    assert same(two, compressed(model, inputs, Registers(extra=2, cut="own")))


@pytest.mark.parametrize(("cut", "last"), [("engine", 37), ("own", 37), ("late", 38)])
def test_the_trace_counts_them(cut: str, last: int) -> None:
    model = llava()
    inputs = make_inputs(model, [[4, "image", 6]])
    with torch.no_grad(), tokprune.compress(model, Registers(cut=cut)) as trace:
        model(**inputs)
    (record,) = trace.last.records
    rows = [attended for attended, _ in trace.last.tower_rows(record)]
    assert rows == [[38]] * (LAYERS - 1) + [[last]]
    assert trace.last.tower_output(record) == [37]


def test_a_pass_with_it_is_nobody_elses() -> None:
    model = llava()
    inputs = make_inputs(model, [[4, "image", 6]])
    with torch.no_grad(), SharedEncoder(bind(model)) as shared:
        shared.remember(inputs["pixel_values"])
        plain = model(**inputs).logits
        for _ in range(2):
            with tokprune.compress(model, Registers(share="same")):
                altered = model(**inputs).logits
        assert (shared.ran, shared.spared) == (3, 0)
        assert torch.equal(model(**inputs).logits, plain)
        assert shared.spared == 1
    assert not same(altered, plain)


def test_checkpointed_blocks_compute_the_same() -> None:
    grads = []
    for checkpoints in (False, True):
        model = llava()
        inputs = make_inputs(model, [[4, "image", 6]])
        if checkpoints:
            model.train()
            model.gradient_checkpointing_enable()
        with tokprune.compress(model, Registers()):
            model(**inputs, use_cache=False).logits.square().mean().backward()
        first = model.model.vision_tower.get_parameter(
            next(n for n, _ in model.model.vision_tower.named_parameters() if "0.mlp.fc1.w" in n)
        )
        grads.append(first.grad)
    assert same(*grads)


def test_what_cannot_work_is_refused() -> None:
    model = llava()
    inputs = make_inputs(model, [[4, "image", 6]])
    for extra in (-1, 1.5, "1"):
        with pytest.raises(ContractError, match=r"_Stage: extra_tokens is .*0 or more"):
            tokprune.patch(model, Registers(extra=extra))
    wrong = Registers(cut="widen")
    with (
        tokprune.compress(model, wrong),
        pytest.raises(
            ContractError, match=r"activation\(\) of encoder layer 0: its answer.*1, 38, 48"
        ),
    ):
        model(**inputs)
    model.config.vision_feature_layer = [-2, -3]
    with pytest.raises(ContractError, match="does not read one of its encoder's layers"):
        tokprune.patch(model, Registers())
