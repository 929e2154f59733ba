"""Triton kernels: equal to plain code in the interpreter, compiled for GPUs that are not here, and
equal on the GPU where there is one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import CASES, KERNELS, extremes, operators

from tokprune.operators.kernels import available, door

HERE = Path(__file__).parent

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = [str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=HERE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
        capture_output=True,
        text=True,
    )


# ------------------------------------------------------------------------------------- door


def on_gpu(**other: Any) -> Any:
    """What the door looks at of a tensor."""
    return SimpleNamespace(
        **{"is_cuda": True, "requires_grad": False, "device": SimpleNamespace(index=0), **other}
    )


@pytest.fixture
def fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU and a Triton that fit."""
    monkeypatch.delenv("TOKPRUNE_KERNELS", raising=False)
    monkeypatch.setattr(door, "_installed", lambda: True)
    monkeypatch.setattr(door, "_recent", lambda device: True)


@pytest.mark.usefixtures("fit")
def test_door_opens_for_tensors_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert available(on_gpu(), on_gpu())
    assert not available(on_gpu(), torch.ones(1))
    assert not available(on_gpu(requires_grad=True))
    with torch.no_grad():
        assert available(on_gpu(requires_grad=True))
    for name in ("_installed", "_recent"):
        with patch.object(door, name, lambda *x: False):
            assert not available(on_gpu())
    with patch.object(torch.compiler, "is_compiling", lambda: True):
        assert not available(on_gpu())


@pytest.mark.usefixtures("fit")
@pytest.mark.parametrize(("value", "want"), [("0", False), ("1", True)])
def test_door_closes_by_the_environment(
    value: str, want: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKPRUNE_KERNELS", value)
    assert available(on_gpu()) is want


def test_nothing_imports_triton_without_need() -> None:
    done = run_python(
        "-c",
        "import sys, torch\n"
        "before = 'triton' in sys.modules\n"
        "from tokprune import operators as ops\n"
        "x = torch.randn(2, 9, 4)\n"
        "ops.divprune(x, 3), ops.dpp_map(x, 3), ops.bipartite_soft_matching(x, 2)\n"
        "assert before or 'triton' not in sys.modules\n"
        "assert not [name for name in sys.modules if name.startswith('tokprune.operators.kernels.')"
        " and not name.endswith('.door')]\n",
    )
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------ interpreter


def release(package: str) -> tuple[int, int]:
    major, minor = version(package).split(".")[:2]
    return int(major), int(minor)


@needs_triton
def test_kernels_equal_plain_code_in_the_interpreter() -> None:
    if release("triton") < (3, 7) and release("numpy") >= (2, 4):
        pytest.skip("the interpreter of Triton 3.6 needs numpy < 2.4")
    done = run_python(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest", "interpreted_kernels.py",
        TRITON_INTERPRET="1", OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


# --------------------------------------------------------------------------------- compiler

#: one call of each launcher as operators make it, at the sizes at which kernels differ
CALLS: dict[str, Callable[[], Any]] = {}


def launcher(name: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    def keep(call: Callable[[], Any]) -> Callable[[], Any]:
        CALLS[name] = call
        return call

    return keep


def matrix(n: int) -> torch.Tensor:
    """[1, n, n] that takes no memory: nothing is read here."""
    return torch.zeros(1).expand(1, n, n)


for _n in (576, 4096, 8192):
    first, mask = torch.zeros(1, dtype=torch.long), torch.ones(1, _n, dtype=torch.bool)
    CALLS[f"k-center {_n}"] = lambda n=_n, f=first, m=mask: operators(
        "kernels.greedy"
    ).greedy_picks(matrix(n), 64, f, m)
    CALLS[f"dpp {_n}"] = lambda n=_n, m=mask: operators("kernels.dpp").dpp_picks(matrix(n), 64, m)
    CALLS[f"coverage {_n}"] = lambda n=_n, m=mask: operators("kernels.coverage").coverage_picks(
        matrix(n), torch.zeros(1, n), 64, m, multiply=True
    )


@launcher("max-sum 577")
def max_sum() -> None:
    first = torch.zeros(1, dtype=torch.long)
    operators("kernels.greedy").greedy_picks(matrix(577), 64, first, None, total=True)


@launcher("distances 1024")
def distances() -> None:
    first = torch.zeros(1, dtype=torch.long)
    operators("kernels.greedy").greedy_picks(matrix(1024), 64, first, None, cosine=False)


@launcher("nearest other")
def nearest_other() -> None:
    operators("kernels.greedy").nearest_other(matrix(576), torch.ones(1, 576, dtype=torch.bool))


@launcher("k-center from features")
def greedy_steps() -> None:
    rows, first = torch.zeros(1, 16384, 64), torch.zeros(1, dtype=torch.long)
    operators("kernels.steps").greedy_steps(rows, 1, first, None, total=False)


@launcher("dpp from features")
def dpp_steps() -> None:
    rows = torch.zeros(1, 16384, 64)
    operators("kernels.steps").dpp_steps(rows, rows[..., 0], 1, None)


@launcher("match")
def match() -> None:
    unit = torch.zeros(2, 577, 64)
    operators("kernels.match").best_neighbour(unit[:, ::2], unit[:, 1::2], 1)


@launcher("received float32")
def received(dtype: torch.dtype = torch.float32) -> None:
    q, mask = torch.zeros(1, 4, 576, 128, dtype=dtype), torch.ones(1, 576, dtype=torch.bool)
    operators("kernels.received").received_sums(
        q, q[:, :2], 0.1, torch.zeros(1, 576, dtype=torch.long), causal=True, others_only=True,
        key_valid=mask, row_valid=mask, softcap=30.0,
    )  # fmt: skip


@launcher("received float16")
def received_half() -> None:
    received(torch.float16)


@launcher("gather")
def gather() -> None:
    index = torch.zeros(1, 64, dtype=torch.long)
    wide = torch.zeros(1, 576, 4096, dtype=torch.bfloat16)
    tensors = [wide, wide[..., 0], wide[..., :128], torch.ones(1, 576, dtype=torch.bool)]
    operators("kernels.gather").gathered(tensors, index)


class Recorder:
    """Stands for a kernel and keeps what it would be launched with."""

    def __init__(self, kernel: Any, launches: list[Any]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **options: self.launches.append((self.kernel, args, options))


def recorded(call: Callable[[], Any]) -> list[Any]:
    from triton.runtime import JITFunction

    launches: list[Any] = []
    modules = [operators(f"kernels.{name}") for name in KERNELS]
    kernels = [
        (module, name, value)
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and value.__module__ == module.__name__
    ]
    for module, name, value in kernels:
        setattr(module, name, Recorder(value, launches))
    try:
        call()
    finally:
        for module, name, value in kernels:
            setattr(module, name, value)
    return launches


def compiled(launch: Any, capability: int) -> Any:
    """The launched kernel as Triton would compile it: numbers divisible by 16 and 1 told apart."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = {
        torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64",
        torch.int32: "i32", torch.int16: "i16", torch.uint8: "u8",
    }  # fmt: skip
    kernel, args, options = launch
    values = dict(zip(kernel.arg_names, args))
    constants: dict[Any, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def typed(value: Any, path: tuple[int, ...], special: bool) -> Any:
        if isinstance(value, tuple):
            return tuple(typed(x, (*path, at), special) for at, x in enumerate(value))
        if isinstance(value, float):
            return "fp32"
        number = value.data_ptr() if isinstance(value, torch.Tensor) else value
        if number == 1 and special:
            constants[path] = 1
            return "constexpr"
        if number % 16 == 0 and special:
            attributes[path] = [["tt.divisibility", 16]]
        return "*" + names[value.dtype] if isinstance(value, torch.Tensor) else "i32"

    signature = {}
    for at, param in enumerate(kernel.params):
        if param.name in options:
            constants[(at,)], signature[param.name] = options[param.name], "constexpr"
        else:
            special = not param.do_not_specialize
            signature[param.name] = typed(values[param.name], (at,), special)
    source = ASTSource(kernel, signature, constants, attributes)
    settings = {name: x for name, x in options.items() if name not in kernel.arg_names}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=settings)


def resources(cubin: bytes, folder: Path) -> dict[str, int]:
    """Registers, stack (where spilled registers go) and local memory, from the binary."""
    import triton

    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    text = subprocess.run(
        [str(tool), "-res-usage", str(path)], capture_output=True, text=True, check=True
    ).stdout
    usage = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    assert usage.keys() == {"REG", "STACK", "LOCAL"}, text
    return usage


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1: kernels are interpreted in this process")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", CALLS)
def test_kernel_compiles_without_spills(
    name: str, capability: int, compiler: Path, record_property: Callable[[str, object], None]
) -> None:
    launches = recorded(CALLS[name])
    assert launches
    seen = set()
    for launch in launches:
        kernel, _, options = launch
        if kernel.__name__ in seen:
            continue
        seen.add(kernel.__name__)
        binary = compiled(launch, capability)
        assert "tf32" not in binary.asm["ptx"]
        used = resources(binary.asm["cubin"], compiler)
        line = f"sm_{capability} {kernel.__name__} {options} {used} shared={binary.metadata.shared}"
        print(line)
        record_property(kernel.__name__, line)
        assert used["STACK"] == used["LOCAL"] == 0, line
        assert used["REG"] * 32 * options["num_warps"] <= 65536, line
        assert binary.metadata.shared <= 163 * 1024, line  # of one block on sm_80


@needs_triton
@pytest.mark.parametrize("name", KERNELS)
def test_kernel_compiles_for_one_token(name: str, compiler: Path) -> None:
    """Triton makes a number 1 part of the code, which other sizes do not show."""
    one = torch.zeros(1, 1, 1)
    first, mask = torch.zeros(1, dtype=torch.long), torch.ones(1, 1, dtype=torch.bool)
    module = operators(f"kernels.{name}")
    calls: dict[str, Callable[[], Any]] = {
        "coverage": lambda: module.coverage_picks(one, one[0], 1, mask, multiply=False),
        "dpp": lambda: module.dpp_picks(one, 1, mask),
        "gather": lambda: module.gathered([one, one.byte()], first[None]),
        "greedy": lambda: (
            module.greedy_picks(one, 1, first, mask, total=True),
            module.nearest_other(one, mask),
        ),
        "match": lambda: module.best_neighbour(one, one),
        "received": lambda: module.received_sums(
            one[None], one[None], 1.0, first[None], causal=True, others_only=True,
            key_valid=mask, row_valid=mask, softcap=None,
        ),
        "steps": lambda: (
            module.greedy_steps(one, 1, first, mask, total=True),
            module.dpp_steps(one, one[0], 1, mask),
        ),
    }  # fmt: skip
    launches = recorded(calls[name])
    assert launches
    for launch in launches:
        assert "cubin" in compiled(launch, 90).asm


@needs_triton
def test_every_kernel_is_compiled() -> None:
    from triton.runtime import JITFunction

    launched = {launch[0].__name__ for call in CALLS.values() for launch in recorded(call)}
    there = {
        name
        for module in KERNELS
        for name, value in vars(operators(f"kernels.{module}")).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    }
    assert launched == there


# -------------------------------------------------------------------------------------- GPU


@pytest.mark.gpu
@needs_gpu
@needs_triton
@pytest.mark.parametrize("case", CASES)
def test_kernel_equals_plain_code_on_the_gpu(case: str) -> None:
    check, examples = CASES[case]

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(st.data())
    def compare(data: st.DataObject) -> None:
        check(data.draw, "cuda")

    compare()


@pytest.mark.gpu
@needs_gpu
@needs_triton
def test_smallest_and_largest_sets_on_the_gpu() -> None:
    extremes("cuda")


@pytest.mark.gpu
@needs_gpu
@needs_triton
def test_operators_choose_the_kernels_and_can_be_captured() -> None:
    from kernel_cases import plain

    x = torch.randn(2, 300, 64, device="cuda")
    q = torch.randn(2, 4, 300, 64, device="cuda", dtype=torch.bfloat16)
    ops = operators("diversity"), operators("dpp"), operators("attention")
    assert available(x)

    def call() -> tuple[torch.Tensor, ...]:
        diversity, dpp, attention = ops
        first = torch.zeros(2, dtype=torch.long, device="cuda")
        return (
            diversity.divprune(x, 30),
            diversity.max_sum(x, 30, first),
            dpp.dpp_map(x, 30),
            operators("coverage").coverage(x, 30),
            attention.received_attention(q, q),
        )

    with plain():
        want = call()
    call()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call()
    graph.replay()
    torch.cuda.synchronize()
    for new, old in zip(got, want, strict=True):
        torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-6)
