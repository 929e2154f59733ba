"""The authors' kit: it passes what is right, and names in words what is wrong."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from methods_table import ALL
from torch import Tensor
from torch.nn.modules import module as torch_module

import tokprune
from tokprune.engine.contracts import (
    DecoderRun,
    DecoderStage,
    ImageTokens,
    KeepDecision,
    ModelFacts,
    Plan,
    PromptStage,
    ScoringLayer,
    Selection,
    SequenceView,
)
from tokprune.engine.model import ImageLayout
from tokprune.families import registry
from tokprune.families.llava import Llava
from tokprune.methods import Method
from tokprune.methods.base import Budget, check_fits
from tokprune.testing import (
    Check,
    Report,
    check_family,
    check_method,
    register_tiny,
    tiny,
    tiny_families,
    tiny_family,
)

DOCS = Path(__file__).parent.parent / "docs"
Choose = Callable[[Sequence[ImageTokens], int], list[Tensor]]


@dataclass(frozen=True)
class Norms(Method):
    """Keeps the patches of the largest norm.

    Args:
        keep: visual tokens per image.
    """

    name: ClassVar[str] = "test-norms"
    keep: Budget = 9

    def plan(self, facts: ModelFacts) -> Plan:
        check_fits(self.keep, facts)
        return Plan(prompt=(self.stage(),))

    def stage(self) -> PromptStage:
        return Stage(self.keep)


class Stage(PromptStage):
    """``scores`` of a prompt's images; the best ``keep`` of each stay."""

    def __init__(self, keep: int | float) -> None:
        self.keep, self.calls = keep, 0

    def scores(self, images: Sequence[ImageTokens]) -> list[Tensor]:
        return [image.features.norm(dim=-1) for image in images]

    def select(self, images: Sequence[ImageTokens]) -> list[Selection | None]:
        self.calls += 1
        answers: list[Selection | None] = []
        for image, score in zip(images, self.scores(images)):
            k = self.keep if isinstance(self.keep, int) else int(self.keep * image.patches)
            if k >= image.patches:
                answers.append(None)
                continue
            score = score.masked_fill(image.newline, -torch.inf)
            index = score.topk(min(k, image.patches)).indices.sort().values
            answers.append(self.answer(image, index))
        return answers

    def answer(self, image: ImageTokens, index: Tensor) -> Selection:
        return Selection(index)


class BatchMates(Stage):
    def scores(self, images: Sequence[ImageTokens]) -> list[Tensor]:
        return [score.roll(len(images)) for score in super().scores(images)]


class Stateful(Stage):
    def scores(self, images: Sequence[ImageTokens]) -> list[Tensor]:
        return [score.roll(self.calls) for score in super().scores(images)]


class Neighbour(Stage):
    def scores(self, images: Sequence[ImageTokens]) -> list[Tensor]:
        scores = super().scores(images)
        others = [*images[1:], *images[:1]]
        return [
            score.roll(int(other.features.norm(dim=-1).argmax()))
            for score, other in zip(scores, others)
        ]


class Hooking(Stage):
    def select(self, images: Sequence[ImageTokens]) -> list[Selection | None]:
        torch_module.register_module_forward_pre_hook(lambda module, args: None)
        return super().select(images)


class SilentMerge(Stage):
    def answer(self, image: ImageTokens, index: Tensor) -> Selection:
        return Selection(index, image.features[index] * 0.5 + image.features.mean(0))


class ReadsHost(Stage):
    def scores(self, images: Sequence[ImageTokens]) -> list[Tensor]:
        return [image.features.norm(dim=-1) * image.features.norm().item() for image in images]


def with_stage(stage: type[Stage]) -> Method:
    """:class:`Norms` with another stage."""

    @dataclass(frozen=True)
    class Broken(Norms):
        """Wrong on purpose."""

        name: ClassVar[str] = "test-broken"

        def stage(self) -> PromptStage:
            return stage(self.keep)

    return Broken()


@dataclass(frozen=True)
class InDecoder(Method):
    """Keeps visual tokens before decoder layer 3, wrong on purpose.

    Args:
        run: the run to start.
    """

    name: ClassVar[str] = "test-in-decoder"
    run: type[DecoderRun] = DecoderRun

    def plan(self, facts: ModelFacts) -> Plan:
        run = self.run

        class Decoder(DecoderStage):
            prune_before = frozenset({3})

            def start(self) -> DecoderRun:
                return run()

        return Plan(decoder=(Decoder(),))


class EvenPlaces(DecoderRun):
    """Counts places from the start of the padded batch."""

    def before_layer(
        self, layer: int, hidden: Tensor, sequence: SequenceView, scoring: ScoringLayer
    ) -> KeepDecision | None:
        even = torch.arange(hidden.shape[1]) % 4 == 0
        return KeepDecision(sequence.visual & even)


class LyingCounts(DecoderRun):
    def before_layer(
        self, layer: int, hidden: Tensor, sequence: SequenceView, scoring: ScoringLayer
    ) -> KeepDecision | None:
        nothing = torch.zeros_like(sequence.visual)
        return KeepDecision(nothing, [[5] * len(row) for row in sequence.counts])


def failed(report: Report) -> dict[str, str]:
    return {check.name: check.words for check in report.failures}


def report_of(method: Any, **options: Any) -> Report:
    return check_method(method, families=["llava-1.5"], **options)


# ------------------------------------------------------------------------------- what is right


def test_a_good_method_passes() -> None:
    report = check_method(Norms, keep=7, families=["llava-1.5", "llava-next"])
    assert report.passed, str(report)
    report.raise_for_failures()
    assert str(report).startswith("Norms(keep=7)\nok ")
    assert str(report).endswith(f"all {len(report.checks)} passed")
    assert {check.family for check in report.checks} == {"", "llava-1.5", "llava-next"}
    not_done = [c for c in report.checks if re.match("not checked|refused|adaptive", c.words)]
    assert not_done == []


@pytest.mark.parametrize("case", ["fastv", "visionzip", "sparsevlm", "mustdrop", "centerclip"])
def test_methods_of_every_stage_pass(case: str) -> None:
    """Dropping and merging, in the tower, at the input, in decoder and cache."""
    method, options = ALL[case]
    report = check_method(method, families=["llava-next"], **options)
    assert report.passed, str(report)
    assert any("of 276 visual tokens" in check.words for check in report.checks)


@pytest.mark.filterwarnings("ignore:evs found no video")
def test_videos_and_what_is_refused() -> None:
    report = check_method("evs", keep=20, families=["llava-1.5", "llava-next-video"])
    assert report.passed, str(report)
    still = [check.words for check in report.checks if check.family == "llava-1.5"]
    assert still[-1].startswith("refused: ")
    assert len(still) < len([c for c in report.checks if c.family == "llava-next-video"])
    report = check_method("grid", keep=40, families=["llava-1.5"])
    assert report.passed
    assert report.checks[-1].words.startswith("refused: keep=40 is larger than the 36 visual")


def test_reads_of_the_host_are_reported() -> None:
    words = {check.name: check.words for check in report_of(with_stage(ReadsHost)).checks}
    if "host reads" in words:  # not with transformers 4
        assert words["host reads"].startswith("adaptive: reads the host in ")
        assert "features.norm().item()" in words["host reads"]


# ------------------------------------------------------------------------------- what is wrong


@pytest.fixture
def no_hooks_left() -> Iterator[None]:
    """What the toy that leaves hooks leaves goes with the test."""
    yield
    torch_module._global_forward_pre_hooks.clear()


BROKEN = [
    (BatchMates, "batch as alone, left padding", r"row 0 of the left-padded batch is compressed in "
     r"another way than alone; decoder layer 0: only in the batch it keeps prompt columns \[\d"),
    (Stateful, "no state between forwards", r"after another prompt ran in between \(state is kept "
     r"from one forward to the next\); batch row 0, decoder layer 0: only the second time"),
    (Neighbour, "other images", r"what is kept of image \d changes when the pixels of image \d of "
     r"the same prompt do .*: its score reads another image's tokens"),
    (Hooking, "unpatch leaves nothing", r"the model is not as it was before the method ran: hooks "
     r"of all modules of _global_forward_pre_hooks"),
    (SilentMerge, "oracle, one prompt, sdpa", r"the logits differ by \d.*, most in batch row 0 at "
     r".*; a stage that merges should say so \(Selection.group\)"),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "check", "words"), BROKEN, ids=[b[0].__name__ for b in BROKEN])
def test_faults_are_named(stage: type[Stage], check: str, words: str, no_hooks_left: None) -> None:
    found = failed(report_of(with_stage(stage)))
    assert check in found
    assert re.search(words, found[check]), found[check]


def test_padding_that_counts_is_named() -> None:
    found = failed(report_of(InDecoder(EvenPlaces)))
    assert re.search(
        r"row \d of the left-padded batch .* decoder layer 3: only in the batch",
        found["batch as alone, left padding"],
    )


def test_counts_that_lie_are_named() -> None:
    found = failed(report_of(InDecoder(LyingCounts)))
    assert "counts" in found["oracle, one prompt, sdpa"]
    assert re.search(r"ContractError .*InDecoder.*5", found["generate"], re.DOTALL)


def test_options_without_words_bad_budgets_and_methods_that_do_nothing() -> None:
    @dataclass(frozen=True)
    class Careless(Norms):
        """Says nothing about its option."""

        name: ClassVar[str] = "Careless"
        slope: float = 0.5

        def __post_init__(self) -> None:
            pass

        def plan(self, facts: ModelFacts) -> Plan:
            return Plan()

    report = report_of(Careless)
    found = failed(report)
    assert found["declared"].startswith("Careless.name='Careless' should be a word in lower case")
    assert found["documented"].startswith("nothing is said about option(s) slope:")
    assert found["bad budgets"].startswith("keep=0 is accepted; it should be refused")
    assert found["drops something"].startswith("it kept every visual token everywhere")
    with pytest.raises(AssertionError, match=r"Careless\(keep=9, slope=0.5\): 4 of \d+ checks"):
        report.raise_for_failures()


def test_arguments() -> None:
    with pytest.raises(ValueError, match=r"family='llava-2' has no tiny model; .*llava-1.5"):
        check_method("grid", keep=9, families=["llava-2"])
    with pytest.raises(TypeError, match=r"method=<class 'int'> should be derived from"):
        check_method(int)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="build=3 should be a function"):
        register_tiny("test", 3)  # type: ignore[arg-type]


def test_raise_and_table() -> None:
    report = Report("it", [Check("one", "f", True, "well"), Check("two", "", False, "3 apart")])
    assert str(report) == "it\nok    f: one  well\nFAIL  two     3 apart\n1 of 2 failed"
    with pytest.raises(AssertionError, match=r"it: 1 of 2 checks failed\n- two: 3 apart"):
        report.raise_for_failures()
    with pytest.raises(AssertionError, match="drops something"):
        report_of("grid", keep=1.0, raise_=True)


# ------------------------------------------------------------------------------- families


@pytest.mark.parametrize(
    ("family", "build"),
    [("llava-1.5", {"tower": "siglip"}), ("llava-next", {"decoder": "mistral"})],
)
def test_families_pass(family: str, build: dict[str, Any]) -> None:
    report = check_family(family, **build)
    assert report.passed, str(report)


class Backwards(Llava):
    def images(self, *args: Any) -> list[ImageLayout]:
        found = super().images(*args)
        return [replace(layout, packed=layout.packed.flip(0)) for layout in found]


class OneLess(Llava):
    def images(self, *args: Any) -> list[ImageLayout]:
        found = super().images(*args)
        return [replace(layout, packed=layout.packed[1:]) for layout in found]


class Shallow(Llava):
    def facts(self, *args: Any) -> ModelFacts:
        return replace(super().facts(*args), decoder_layers=7)


FAMILIES = [
    (Backwards, "order of the tokens", r"image 0 .*: 36 of 36 prompt tokens do not have the "
     r"feature that layout.packed says, the first at 0 \(packed 35\)"),
    (OneLess, "tokens per image", r"the model itself does not take \[35\] placeholder tokens"),
    (Shallow, "facts", r"facts.decoder_layers is 7, but the decoder has 8"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "check", "words"), FAMILIES, ids=[f[0].__name__ for f in FAMILIES]
)
def test_faults_of_families_are_named(
    family: type[Llava], check: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {**registry._FAMILIES, "LlavaForConditionalGeneration": family()}
    monkeypatch.setattr(registry, "_FAMILIES", known)
    found = failed(check_family("llava-1.5"))
    assert re.search(words, found[check]), found[check]


def test_families_of_other_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "_TINY", tiny_families())
    register_tiny(
        "test-shallow", lambda attention="sdpa": tiny.llava(layers=6, attention=attention)
    )
    assert "test-shallow" in tiny_families()
    assert tiny_family(tiny.llava_next).name == "llava-next"
    report = check_method("random", keep=9, families=["test-shallow", tiny.llava_next])
    assert report.passed, str(report)


# ------------------------------------------------------------------------------- the page


def test_the_page_of_the_kit_runs(capsys: pytest.CaptureFixture[str]) -> None:
    from tokprune.methods import registry as methods

    tokprune.methods.available_methods()
    before = dict(methods._METHODS)
    code = re.findall(r"```python\n(.*?)```", (DOCS / "testing.md").read_text("utf-8"), re.DOTALL)
    assert len(code) >= 3
    names: dict[str, Any] = {"__name__": "page"}
    try:
        for block in code:
            exec(block, names)
    finally:
        methods._METHODS.clear()
        methods._METHODS.update(before)
    assert "passed" in capsys.readouterr().out


def test_needs_no_test_runner() -> None:
    code = "import sys, tokprune.testing; print('pytest' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "False\n"
