"""``torch.compile`` and patches, in any order: the compressed result, never an earlier one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from family_cases import METHODS as CASES
from family_cases import SHAPES, case_of
from torch import Tensor
from torch._dynamo.utils import counters

import tokprune
from tokprune.methods import make_method
from tokprune.testing import Case, assert_same_logits, tiny_family
from tokprune.testing.case import GREEDY

METHODS = ["divprune", "fastv"]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).logits  # type: ignore[no-any-return]


def whole(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def in_place(model: Any) -> Any:
    model.compile(backend="eager")
    return model


def decoder(model: Any) -> Any:
    model.model.language_model.compile(backend="eager")
    return model


def layers(model: Any) -> Any:
    for layer in model.model.language_model.layers:
        layer.compile(backend="eager")
    return model


def tower(model: Any) -> Any:
    model.model.vision_tower.compile(backend="eager")
    return model


def forward_alone(model: Any) -> Any:
    model.forward = torch.compile(model.forward, backend="eager")
    return model


WAYS = {
    "whole": whole,
    "in place": in_place,
    "decoder": decoder,
    "tower": tower,
    "forward": forward_alone,
}


def case_on_own_model(method: str, family: str = "llava-1.5") -> Case:
    """A model of two layers: compiling takes its time."""
    tiny = tiny_family(family)
    options = {"prune_before": 1} if method == "fastv" else {}
    made = make_method(method, keep=4, **options)
    return Case(made, tiny, tiny.build(attention="sdpa", layers=2), [[4, "image", 6], [5]])


@pytest.mark.parametrize(
    ("method", "way"),
    [
        ("fastv", "whole"),
        pytest.param("divprune", "in place", marks=pytest.mark.full),
        ("fastv", "decoder"),
        ("divprune", "tower"),
        pytest.param("fastv", "forward", marks=pytest.mark.full),
    ],
)
def test_compiled_and_run_before_the_patch(method: str, way: str) -> None:
    case = case_on_own_model(method)
    check(case, WAYS[way], first=True)


def test_layers_compiled_before_the_patch() -> None:
    check(case_on_own_model("fastv"), layers, first=True)


@pytest.mark.full
def test_patched_and_run_before_compiling() -> None:
    check(case_on_own_model("fastv"), whole, first=False)


@pytest.mark.full
@pytest.mark.parametrize("family", ["llava-next", "qwen2.5-vl", "gemma3"])
@pytest.mark.parametrize("method", METHODS)
def test_other_families(method: str, family: str) -> None:
    check(case_on_own_model(method, family), whole, first=True)


def check(case: Case, compiled: Callable[[Any], Any], first: bool) -> None:
    inputs = case.inputs()
    plain = logits(case.model, inputs)
    with case.compress() as trace:
        want = logits(case.model, inputs)
        counts = trace.last and trace.last.layers[-1].counts
    assert want.shape != plain.shape
    if first:
        fast = compiled(case.model)
        assert_same_logits(logits(fast, inputs), plain)
    with case.compress() as trace:
        if not first:
            logits(case.model, inputs)
            fast = compiled(case.model)
        for _ in range(2):
            assert_same_logits(logits(fast, inputs), want)
            assert trace.last is not None
            assert trace.last.layers[-1].counts == counts
    assert_same_logits(logits(fast, inputs), plain)


def test_one_patch_after_the_other() -> None:
    case = case_on_own_model("divprune")
    inputs, fast = case.inputs(), whole(case.model)
    for method, options in (("divprune", {}), ("random", {}), ("fastv", {"prune_before": 1})):
        made = make_method(method, keep=3, **options)
        plain = copy.deepcopy(case.model)
        with tokprune.compress(plain, made):
            want = logits(plain, inputs)
        tokprune.patch(case.model, made)
        assert_same_logits(logits(fast, inputs), want)
    tokprune.unpatch(case.model)
    tokprune.unpatch(plain)  # a copy of a patched model is patched
    assert_same_logits(logits(fast, inputs), logits(plain, inputs))


@pytest.mark.full
def test_generate() -> None:
    case = case_on_own_model("fastv")
    inputs = case.inputs()
    with case.compress():
        want = case.model.generate(**inputs, **GREEDY)
    plain = case.model.generate(**inputs, **GREEDY)
    case.model.compile(backend="eager")
    assert torch.equal(case.model.generate(**inputs, **GREEDY), plain)
    with case.compress():
        assert torch.equal(case.model.generate(**inputs, **GREEDY), want)
    assert torch.equal(case.model.generate(**inputs, **GREEDY), plain)


def test_a_full_graph_is_refused_with_the_reason() -> None:
    case = case_on_own_model("divprune")
    fast = torch.compile(case.model, backend="eager", fullgraph=True)
    with case.compress(), pytest.raises(Exception, match="tokprune"):
        logits(fast, case.inputs())


@pytest.mark.parametrize("strict", [False, True])
def test_export_is_refused(strict: bool) -> None:
    case = case_on_own_model("divprune")
    with case.compress(), pytest.raises(Exception, match="tokprune"):
        torch.export.export(case.model, (), kwargs=dict(case.inputs()), strict=strict)


def test_forward_is_the_models_again() -> None:
    case = case_on_own_model("fastv")
    mine = lambda *args, **kwargs: type(case.model).forward(case.model, *args, **kwargs)  # noqa: E731
    case.model.forward = mine
    with case.compress():
        assert case.model.forward is not mine
    assert case.model.forward is mine
    changed = [m for m in case.model.modules() if "forward" in m.__dict__]
    assert changed == [case.model]


# ---------------------------------------------------------------------- graphs of prefills


class Graphs:
    """A backend that keeps what it is given; to go beyond the recompile limit is an error."""

    def __init__(self) -> None:
        self.made: list[Any] = []

    def __call__(self, graph: Any, example: Any) -> Any:
        self.made.append(graph)
        return graph.forward

    def of_decoder(self, model: Any) -> Any:
        model.model.language_model.compile(backend=self)
        return model

    def attentions(self) -> list[int]:
        """Calls of attention in every graph that has any."""
        found = [
            sum("scaled_dot_product" in str(node.target) for node in graph.graph.nodes)
            for graph in self.made
        ]
        return [n for n in found if n]


@pytest.fixture
def graphs() -> Iterator[Graphs]:
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield Graphs()


def deep_case(method: Any, family: str, layers: int, shape: str = "single") -> Case:
    return case_of(
        method, family, SHAPES[shape], tiny_family(family).build(attention="sdpa", layers=layers)
    )


def kept(trace: Any) -> list[Any]:
    return [(layer.counts, layer.lengths) for layer in trace.last.layers]


def three_requests(case: Case, graphs: Graphs, compiled: Callable[[Any], Any]) -> None:
    """Other pixels of the same sizes compile nothing anew, and give what they give in Python."""
    asked = [case.inputs(seed) for seed in range(3)]
    wanted = []
    with case.compress() as trace:
        for inputs in asked:
            wanted.append((logits(case.model, inputs), kept(trace)))
    assert not graphs.made
    fast, frames = compiled(case.model), []
    with case.compress() as trace:
        for inputs, (want, left) in zip(asked, wanted):
            assert_same_logits(logits(fast, inputs), want)
            assert kept(trace) == left
            frames.append((len(graphs.made), counters["frames"]["total"]))
    assert len(set(frames)) == 1


#: a selection at the input, drops in the decoder (before one layer; before several, by taps; and of
#: the cache), merges in the tower
ONE_GRAPH = [
    ("random-compact", "llava-1.5", 12),
    ("fastv-compact", "gemma3", 4),
    ("pyramiddrop", "qwen2.5-vl", 5),
    ("mustdrop", "internvl", 5),
    ("tome", "llava-next", 3),
]
#: their arithmetic reads the device
READS = {"dart", "todre", "evs"}
FULL = [
    ("random-compact", "llava-1.5", 28),
    ("fastv", "qwen2.5-vl", 28),
    *((m, "llava-1.5", 6) for m in CASES if m not in READS),
    *(
        (m, f, 6)
        for f in ("llava-next", "qwen2.5-vl", "gemma3", "internvl", "qwen3-vl", "gemma4")
        for m in ("divprune", "fastv-compact", "sparsevlm-recycled", "visionzip")
    ),
]


@pytest.mark.parametrize(
    ("method", "family", "layers"),
    [*ONE_GRAPH, *(pytest.param(*case, marks=pytest.mark.full) for case in FULL)],
)
def test_a_decoder_is_one_graph(method: str, family: str, layers: int, graphs: Graphs) -> None:
    case = deep_case(method, family, layers)

    three_requests(case, graphs, graphs.of_decoder)
    assert len(graphs.made) == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize(
    ("method", "way"),
    [
        ("visionzip", "whole"),
        *(
            pytest.param(method, way, marks=pytest.mark.full)
            for method, way in (
                ("fastv", "whole"), ("fastv", "in place"), ("tome", "forward"), ("random", "whole"),
            )
        ),
    ],
)  # fmt: skip
def test_tower_and_decoder_are_a_graph_each(method: str, way: str, graphs: Graphs) -> None:
    model = tiny_family("llava-1.5").build(attention="sdpa", layers=4, vision_layers=3)
    case = case_of(method, "llava-1.5", SHAPES["single"], model)

    def compiled(model: Any) -> Any:
        if way == "whole":
            return torch.compile(model, backend=graphs)
        if way == "in place":
            model.compile(backend=graphs)
        else:
            model.forward = torch.compile(model.forward, backend=graphs)
        return model

    three_requests(case, graphs, compiled)
    assert graphs.attentions() == [3, 4]


def test_layers_share_no_code() -> None:
    """Or they would share its few versions, where each is compiled for itself."""
    case = case_on_own_model("fastv")
    with case.compress():
        one, other = (
            layer.forward.__func__.__code__ for layer in case.model.model.language_model.layers
        )
    assert one is not other


@pytest.mark.full
def test_layers_are_graphs_where_a_method_reads_the_device(graphs: Graphs) -> None:
    made = make_method("dart", keep=6, prune_before=1, image_pivots=2, text_pivots=2)
    # more layers than one code may have versions
    case = deep_case(made, "llava-1.5", 9)

    three_requests(case, graphs, graphs.of_decoder)
    assert graphs.attentions() == [1] * 9


@pytest.mark.parametrize(
    "method", ["random-compact", pytest.param("fastv", marks=pytest.mark.full)]
)
def test_prompts_of_any_length_share_a_graph(method: str, graphs: Graphs) -> None:
    case = deep_case(method, "llava-1.5", 3 if method == "fastv" else 1)
    asked = [case.having(prompts=[[4 + n, "image", 6 + n % 4]]).inputs() for n in range(11)]
    with case.compress():
        wanted = [logits(case.model, inputs) for inputs in asked]
    graphs.of_decoder(case.model)
    with case.compress():
        for inputs, want in zip(asked, wanted):
            assert_same_logits(logits(case.model, inputs), want)
    assert len(graphs.made) == 2  # of the first length, then of any


@pytest.mark.full
def test_a_ragged_batch(graphs: Graphs) -> None:
    case = deep_case("fastv", "llava-1.5", 3, "ragged")

    three_requests(case, graphs, graphs.of_decoder)
    assert len(graphs.made) == 1


@pytest.mark.full
@pytest.mark.parametrize("method", ["random-compact", "fastv-compact"])
def test_steps_on_a_cache_that_grows(method: str, graphs: Graphs) -> None:
    case = deep_case(method, "llava-1.5", 3)
    inputs = case.inputs()
    with case.compress():
        want = case.model.generate(**inputs, **GREEDY)
    graphs.of_decoder(case.model)
    with case.compress():
        assert torch.equal(case.model.generate(**inputs, **GREEDY), want)
        made = len(graphs.made)
        assert made == 3  # the prompt, a step, steps of any length
        assert torch.equal(case.model.generate(**inputs, **GREEDY), want)
    assert len(graphs.made) == made


@pytest.mark.full
def test_a_tower_whose_method_reads_the_device(graphs: Graphs) -> None:
    """What it finds differs from image to image, and so do the shapes; no layer is left out."""
    model = tiny_family("llava-1.5").build(attention="sdpa", layers=2, vision_layers=14)
    case = case_of("flowcut", "llava-1.5", SHAPES["single"], model)
    inputs = case.inputs()
    with case.compress():
        want = logits(model, inputs)
    fast = torch.compile(model, backend=graphs)
    with case.compress():
        for _ in range(2):
            assert_same_logits(logits(fast, inputs), want)
    assert sum(graphs.attentions()) >= 14
