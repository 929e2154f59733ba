"""The vision encoder in pieces: the same comes out, and fewer bytes are alive on the way.

Models are compared in double precision, in which pieces of other sizes round alike.
"""

from __future__ import annotations

import copy
import functools
import inspect
from itertools import cycle, islice
from typing import Any

import pytest
import torch
import transformers
from live_bytes import LiveBytes
from torch import Tensor

import tokprune
from tokprune.api import session_of
from tokprune.cli import app
from tokprune.engine.contracts import EncoderRun, EncoderStage, Plan
from tokprune.engine.shared_encoder import SharedEncoder
from tokprune.errors import CompositionError, UnsupportedModelError, UnsupportedVideoError
from tokprune.families import bind, families_with_pieces
from tokprune.methods import Method, make_method
from tokprune.methods.clip_relevance import TowerRelevance
from tokprune.testing import Case, tiny_family
from tokprune.testing.case import GREEDY, SEVERAL, SIZES, Prompts
from tokprune.testing.checks.host_reads import can_find_host_reads, without_values
from tokprune.testing.families import BUILT_IN
from tokprune.testing.numbering import prompt_positions

STILLS = SEVERAL
VIDEOS: Prompts = [[4, "video", 6], [3, "video", 2, "video", 5], [7]]
MIXED: Prompts = [[4, "video", 3, "image", 6], [7, "image", 1, "video", 9], [2, "image", 3]]
PROMPTS = {"stills": STILLS, "videos": VIDEOS, "mixed": MIXED}

ALL: tuple[str, dict[str, Any]] = ("random", {"keep": 1.0})
DIVPRUNE: tuple[str, dict[str, Any]] = ("divprune", {"keep": 4})
#: observers in the tower, reducers in it, at the language-model input, in the decoder
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "all": ALL,
    "divprune": DIVPRUNE,
    "evs": ("evs", {"keep": 0.4}),
    "fastv": ("fastv", {"keep": 4, "prune_before": 4}),
    "fastervlm": ("fastervlm", {"keep": 5}),
    "todre": ("todre", {"keep": 5, "tau": 0.3, "prune_before": 4}),
    "visionzip": ("visionzip", {"dominant": 3, "contextual": 2}),
    "frames": ("cdpruner", {"keep": 5, "video_unit": 3}),
    "m3": ("m3", {"keep": 1, "positions": "preserve"}),
    "tome": ("tome", {"r": 4}),
    "flowcut": ("flowcut", {"keep": 12}),
    "flowcut-few": ("flowcut", {"keep": 3}),
    "mustdrop": ("mustdrop", {"keep": 4, "prune_before": 4}),
}
#: families that are not another one with a different decoder
FAMILIES = [
    name for name in BUILT_IN
    if "/" not in name and "moe" not in name and name not in ("smolvlm", "idefics3", "paligemma2")
]  # fmt: skip


@functools.cache
def double(family: str) -> Any:
    tiny = tiny_family(family)
    return tiny.build(attention=tiny.backends[-1]).double()


def case_of(family: str, method: Method, kind: str) -> Case:
    return Case(method, tiny_family(family), double(family), PROMPTS[kind])


def inputs_of(case: Case) -> dict[str, Tensor]:
    """Videos of seven frames, or four temporal groups: their last piece is a small one."""
    number = sum(prompt.count("image") for prompt in case.prompts)
    sizes = list(islice(cycle(case.family.sizes or SIZES), number))
    inputs = case.family.inputs(case.model, case.prompts, sizes or None, frames=7)
    return {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}


@torch.no_grad()
def logits(case: Case, most: int | None) -> tuple[Tensor, list[list[int]], bool]:
    """Logits of a prefill, the tokens that each image keeps at the end, and whether the encoder ran
    more often than it does as a whole."""
    inputs, parts = inputs_of(case), bind(case.model).parts
    towers = {parts.encoder, getattr(parts.multimodal, "video_tower", parts.encoder)}
    runs: list[int] = []
    handles = [own.register_forward_hook(lambda *_: runs.append(1)) for own in towers]
    try:
        with tokprune.compress(
            case.model, case.method, validate=True, encode_at_once=most
        ) as trace:
            out = case.model(**inputs, **prompt_positions(case.model, inputs))
    finally:
        for handle in handles:
            handle.remove()
    assert trace.last is not None
    kinds = sum(any(kind in p for p in case.prompts) for kind in ("image", "video"))
    return out.logits, trace.last.layers[-1].counts, len(runs) > kinds


def check(case: Case, most: int) -> None:
    whole, counts, _ = logits(case, None)
    pieces, own, several = logits(case, most)
    assert several
    assert own == counts
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-9 * float(whole.abs().max()))


def possible(family: str, kind: str) -> bool:
    tiny = tiny_family(family)
    return kind == "stills" or (tiny.videos and (kind == "videos" or tiny.mixed))


# ------------------------------------------------------------------------------- the same


@pytest.mark.parametrize(
    ("family", "kind"), [(f, k) for f in FAMILIES for k in PROMPTS if possible(f, k)]
)
def test_families(family: str, kind: str) -> None:
    name, options = METHODS["all"]
    check(case_of(family, make_method(name, **options), kind), 2 if kind == "stills" else 3)


MET = [
    *(("llava-1.5", "stills", m) for m in ("visionzip", "fastervlm", "tome", "flowcut")),
    ("llava-1.5", "stills", "mustdrop"),
    *(("llava-next", "stills", m) for m in ("visionzip", "flowcut", "fastv", "m3")),
    *(("llava-onevision", "mixed", m) for m in ("fastervlm", "divprune", "evs", "frames")),
    *(("llava-next-video", "mixed", m) for m in ("fastervlm", "m3")),
    *(("qwen2-vl", k, "flowcut-few") for k in ("stills", "videos")),
    *(("qwen2.5-vl", "mixed", m) for m in ("visionzip", "evs", "mustdrop", "frames")),
    *(("qwen3-vl", "mixed", m) for m in ("fastervlm", "divprune", "fastv")),
    *(("internvl", "stills", m) for m in ("visionzip", "fastervlm")),
    *((f, "stills", "todre") for f in ("gemma3", "paligemma", "mistral3", "aya-vision")),
    *((f, "videos", "todre") for f in ("llava-next-video", "qwen2.5-vl", "video-llava")),
]  # fmt: skip


@pytest.mark.parametrize(("family", "kind", "method"), MET)
def test_methods(family: str, kind: str, method: str) -> None:
    name, options = METHODS[method]
    check(case_of(family, make_method(name, **options), kind), 1 if kind == "stills" else 2)


@pytest.mark.parametrize("family", ["llava-1.5", "qwen2.5-vl"])
def test_gradients(family: str) -> None:
    case = case_of(family, make_method("divprune", keep=4), "stills")
    inputs, weight = inputs_of(case), next(bind(case.model).parts.encoder.parameters())
    found = []
    for most in (None, 1):
        case.model.zero_grad()
        with tokprune.compress(case.model, case.method, encode_at_once=most):
            case.model(**inputs).logits.float().square().mean().backward()
        found.append(weight.grad.clone())
    case.model.zero_grad()
    assert found[0].abs().max() > 0
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("family", ["llava-onevision", "qwen3-vl", "internvl"])
def test_generate(family: str) -> None:
    kind = "mixed" if tiny_family(family).videos else "stills"
    case = case_of(family, make_method("divprune", keep=4), kind)
    inputs = inputs_of(case)
    # transformers 4 itself does not come to beams of Qwen3-VL with rows without a video
    beams = [] if transformers.__version__.startswith("4.") else [{**GREEDY, "num_beams": 2}]
    for options in (GREEDY, *beams):
        told = []
        for most in (None, 2):
            with tokprune.compress(case.model, case.method, encode_at_once=most):
                told.append(case.model.generate(**inputs, **options))
        assert torch.equal(*told)


def test_an_own_question_for_every_image_stays_with_it() -> None:
    """A stage that knows its images by number counts them over the whole call."""
    case = case_of("llava-1.5", make_method("random", keep=5), "stills")
    seen: list[list[int]] = []

    class Numbers(TowerRelevance):
        def __init__(self) -> None:
            self.embeds = [torch.zeros(1)] * 3

        def project(self, patches: Tensor) -> Tensor:
            return patches

        def score(self, patches: Tensor, tower: Any) -> Tensor:
            seen.append([tower.first_image + i for i in tower.image_of_tile])
            assert tower.call_images == (0 if len(patches) == 3 else 3)
            return patches.sum(-1)

    logits(case.having(method=make_method("cdpruner", keep=5, relevance=Numbers())), 2)
    assert seen == [[0, 1], [2]]


def test_a_copy_encodes_in_pieces_too() -> None:
    model = tiny_family("llava-1.5").build()
    tokprune.patch(model, "divprune", keep=4, encode_at_once=3)
    other = session_of(copy.deepcopy(model))
    assert other is not None
    assert other.encode_at_once == 3


def test_loaded_and_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    own = session_of(tokprune.load("mini", "divprune", keep=9, encode_at_once=2))
    assert own is not None
    assert own.encode_at_once == 2
    with pytest.raises(ValueError, match="encode_at_once=2 belongs to a patch"):
        tokprune.load("mini", encode_at_once=2)
    with pytest.raises(TypeError, match=r"encode_at_once=2\.5"):
        tokprune.load("mini", "divprune", keep=9, encode_at_once=2.5)  # type: ignore[arg-type]
    with pytest.raises(SystemExit):
        app(["run", "--model", "mini", "--prompt", "?", "--encode-at-once", "2"])
    assert "--encode-at-once needs --method" in capsys.readouterr().err


def test_a_shared_encoder_runs_whole() -> None:
    case = case_of("llava-1.5", make_method("divprune", keep=4), "stills")
    inputs = inputs_of(case)
    want = logits(case, None)[0]
    with SharedEncoder(bind(case.model)) as shared, torch.no_grad():
        shared.remember(inputs["pixel_values"])
        positions = prompt_positions(case.model, inputs)
        case.model(**inputs, **positions)
        with tokprune.compress(case.model, case.method, encode_at_once=1):
            out = case.model(**inputs, **positions)
        assert (shared.ran, shared.spared) == (1, 1)
    torch.testing.assert_close(out.logits, want)


# ------------------------------------------------------------------------------- memory


def encoder_peak(family: str, most: int | None) -> int:
    """Bytes alive at once while a video of many frames (or many images) is encoded."""
    tiny = tiny_family(family)
    model = tiny.build(attention=tiny.backends[-1], vision_layers=6)
    if tiny.videos:
        inputs = tiny.inputs(model, [[4, "video", 6]], frames=32)
    else:
        inputs = tiny.inputs(model, [[4, *["image"] * 32, 6]], [(24, 24)] * 32)
    bound, kind = bind(model), "video" if tiny.videos else "image"
    encode = getattr(bound.parts.multimodal, f"get_{kind}_features")
    own = bound.family
    pixels = own.video_pixels if tiny.videos else own.pixels
    call = {n: inputs[n] for n in (f"{kind}_grid_thw", "image_sizes") if n in inputs}
    for setting in ("vision_feature_layer", "vision_feature_select_strategy"):
        if setting in inspect.signature(encode).parameters:  # transformers 4 asks for some
            call[setting] = getattr(model.config, setting)
    with torch.no_grad(), tokprune.compress(model, "random", keep=1.0, encode_at_once=most):
        encode = getattr(bound.parts.multimodal, f"get_{kind}_features")
        with LiveBytes() as live:
            made = encode(inputs[pixels], **call)
    del made
    return live.peak


@pytest.mark.parametrize(
    ("family", "share"),
    [("llava-onevision", 0.4), ("llava-next-video", 0.4), ("qwen2.5-vl", 0.4), ("mistral3", 0.2)],
)
def test_pieces_take_a_fraction(family: str, share: float) -> None:
    assert encoder_peak(family, 4) < share * encoder_peak(family, None)


# ------------------------------------------------------------------------------- host reads


@pytest.mark.skipif(not can_find_host_reads(), reason="transformers 4 itself reads placeholders")
@pytest.mark.parametrize("method", ["divprune", "fastervlm"])
def test_nothing_is_read_back(method: str) -> None:
    family = tiny_family("llava-onevision")
    made = make_method(METHODS[method][0], **METHODS[method][1])
    prompt = [4, "video", 3, "image", 6]
    case = Case(made, family, family.build(), [prompt, prompt], [(20, 40), (20, 40)])
    with (
        without_values(case.model, case.inputs()) as moved,
        tokprune.compress(case.model, made, validate=False, encode_at_once=2),
        torch.no_grad(),
    ):
        assert case.model(**moved).logits.device.type == "meta"


# ------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("family", ["smolvlm", "idefics3"])
def test_a_family_that_cannot_is_refused_by_name(family: str) -> None:
    model = tiny_family(family).build()
    with pytest.raises(UnsupportedModelError, match=r"encode_at_once=4: .* cannot run in pieces"):
        tokprune.patch(model, "divprune", keep=4, encode_at_once=4)
    assert not tokprune.is_patched(model)
    assert "smolvlm" not in families_with_pieces()
    assert "qwen2.5-vl" in families_with_pieces()


@pytest.mark.parametrize(
    ("most", "error"), [(0, ValueError), (2.0, TypeError), (True, TypeError), ("4", TypeError)]
)
def test_a_bad_number(most: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="encode_at_once="):
        tokprune.patch(double("llava-1.5"), "divprune", keep=4, encode_at_once=most)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("mustdrop", {**METHODS["mustdrop"][1], "share_r": "batch"}),
        ("flowcut", {**METHODS["flowcut"][1], "count_reduce": "batch"}),
        ("prumerge", {"ratio_scope": "call"}),
    ],
)
def test_a_method_that_compares_the_images_of_a_batch(method: str, options: Any) -> None:
    with pytest.raises(CompositionError, match=f"encode_at_once=2: {method} as it is set takes"):
        tokprune.patch(double("llava-1.5"), method, encode_at_once=2, **options)


class _Frames(EncoderStage):
    """Looks at all frames of a video together."""

    taps = frozenset({0})
    across = "image"

    def start(self, tower: Any) -> EncoderRun:
        return EncoderRun()


class _Together(Method):
    name = "together"

    def plan(self, facts: Any) -> Plan:
        return Plan(encoder=(_Frames(),))


def test_a_stage_that_compares_frames_needs_all_of_them() -> None:
    case = case_of("llava-onevision", _Together(), "videos")
    with pytest.raises(UnsupportedVideoError, match="encode_at_once=2 shows it"):
        logits(case, 2)
    logits(case, 100)
