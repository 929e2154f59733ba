"""Part (a): compressed prefills and steps on the device against the masked oracle on the CPU.

The method runs on the device, with the attention kernel pinned; which tokens it dropped, and what
it merged, goes to the CPU, where the unpruned model in float32 with the same weights hides the
dropped keys layer by layer (:mod:`tokprune.testing`). So no other device code is trusted.

How far logits may be apart is measured, not set: the unpruned model on the device against itself
on the CPU, in the same dtype and with the same kernel, gives the rounding of one forward. Some
choices of tokens round worse (a near tie inside an attention falls the other way in half
precision), so where that is passed the oracle runs in that dtype too, on the CPU, against itself in
float32. In float32 the farthest logit decides, in half precision the median over tokens; a wrong
mask, position or cache moves them all. How far the unpruned model is from the oracle
(``contrast``) tells how much the comparison can see.
"""

from __future__ import annotations

import copy
import dataclasses
import time
import traceback
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu_parts.journal import Journal, Skipped, last_lines

#: times the unpruned model's own rounding; a compressed forward rounds at other places
SLACK = 5.0
#: rounding that is granted in any case, as a share of the largest logit
LEAST = 1e-5
STEPS = 7
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}  # fmt: skip
#: dtype, kernel, whether the batch is padded (then there is a mask, which flash does not take)
ON_CUDA = (
    (torch.bfloat16, "flash", False), (torch.bfloat16, "efficient", True),
    (torch.float32, "efficient", True), (torch.float32, "efficient", False),
)  # fmt: skip
ON_CPU = ((torch.float32, "math", True), (torch.bfloat16, "flash", False))
FAMILIES = ("llava-1.5", "llava-next")


def run_conformance(
    cases: dict[str, tuple[str, dict[str, Any]]], device: torch.device, seconds: float,
    journal: Journal,
) -> None:  # fmt: skip
    """Every case on every family, dtype and kernel, until the time is over; a line for each.

    Args:
        cases: label → (method, options), as in ``tests/methods_table.py``.
    """
    end = time.perf_counter() + seconds
    for dtype, kernel, padded in ON_CUDA if device.type == "cuda" else ON_CPU:
        label = f"{str(dtype).removeprefix('torch.')}, {kernel}, {'padded' if padded else 'single'}"
        for family in FAMILIES:
            with journal.part("conformance", f"conformance/{family}, {label}") as own:
                found: dict[str, Any] = {}
                own["result"] = found
                bench = _bench(family, device, dtype, kernel, padded)
                for case, (method, options) in cases.items():
                    if time.perf_counter() > end and found:
                        found[case] = {"status": "not reached"}
                        continue
                    found[case] = bench.check(method, options)
                wrong = [case for case, told in found.items() if told["status"] == "wrong"]
                if wrong:
                    raise AssertionError(f"{', '.join(wrong)}: see the result")


def run_flash_attn(
    cases: dict[str, tuple[str, dict[str, Any]]], device: torch.device, journal: Journal
) -> None:
    """The same on flash-attn's own kernels, where it is installed."""
    import importlib.util

    with journal.part("conformance", "conformance/flash-attn") as own:
        if device.type != "cuda" or importlib.util.find_spec("flash_attn") is None:
            raise Skipped("flash-attn is not installed, or this is no CUDA device")
        found: dict[str, Any] = {}
        own["result"] = found
        bench = _Bench("llava-1.5", device, torch.bfloat16, None, True, "flash_attention_2")
        for case, (method, options) in cases.items():
            found[case] = bench.check(method, options)
        wrong = [case for case, told in found.items() if told["status"] == "wrong"]
        if wrong:
            raise AssertionError(f"{', '.join(wrong)}: see the result")


def _bench(*arguments: Any) -> _Bench:
    try:
        return _Bench(*arguments)
    except RuntimeError as error:
        if not no_kernel(error):
            raise
        raise Skipped(f"the unpruned model cannot have this kernel: {error}") from None


def no_kernel(error: RuntimeError) -> bool:
    """Whether the pinned kernel refused what it was given, as CUDA and CPUs say it."""
    return any(words in str(error) for words in ("No available kernel", "No viable backend"))


class _Bench:
    """A tiny model twice, on the CPU in float32 and on the device, and what rounding does."""

    def __init__(
        self, family: str, device: torch.device, dtype: torch.dtype, kernel: str | None,
        padded: bool, attention: str = "sdpa",
    ) -> None:  # fmt: skip
        from tokprune.testing import continuation_tokens, tiny_family
        from tokprune.testing.case import RAGGED, SINGLE
        from tokprune.testing.generated import forced_logits

        self.device, self.dtype, self.kernel = device, dtype, kernel
        self.family, self.prompts = tiny_family(family), RAGGED if padded else SINGLE
        # as many key heads as heads: the memory-efficient kernel knows no grouped ones
        built = self.family.build(num_key_value_heads=4)
        self.cpu = built.to(dtype).float()
        self.own = copy.deepcopy(self.cpu).to(device, dtype)
        if attention != "sdpa":
            self.own.set_attn_implementation(attention)
        self.continuation = continuation_tokens(len(self.prompts), STEPS)
        self.inputs = self.case("random", {"keep": 4}).inputs()
        self.moved = {
            n: v.to(device, dtype if v.is_floating_point() else None)
            for n, v in self.inputs.items()
        }
        rounded = {n: v.to(dtype).float() if v.is_floating_point() else v
                   for n, v in self.inputs.items()}  # fmt: skip
        self.inputs = rounded
        with self.pinned():
            got = forced_logits(self.own, self.moved, self.continuation.to(device))
        self.plain = forced_logits(self.cpu, self.inputs, self.continuation)
        self.rounding = self._error(_apart(got.float().cpu(), self.plain))

    def case(self, method: str, options: dict[str, Any]) -> Any:
        from tokprune.methods import make_method
        from tokprune.testing import Case

        return Case(make_method(method, **options), self.family, self.own, self.prompts)

    def pinned(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.kernel is None else sdpa_kernel(KERNELS[self.kernel])

    def _error(self, apart: Tensor) -> float:
        return float(apart.max() if self.dtype is torch.float32 else apart.median())

    def check(self, method: str, options: dict[str, Any]) -> dict[str, Any]:
        """``status`` ("equal", "wrong", "refused", "no kernel" or "no oracle") and how far apart
        the logits are."""
        case = self.case(method, options)
        try:
            return self._compare(case)
        except Exception as error:  # the others go on
            return {"status": "wrong", "words": last_lines(traceback.format_exc()),
                    "error": f"{type(error).__name__}: {error}"[:500]}  # fmt: skip

    def _compare(self, case: Any) -> dict[str, Any]:
        from tokprune.errors import UnsupportedModelError
        from tokprune.testing.case import last_of
        from tokprune.testing.generated import forced_logits, generated_oracle, recorded_layers
        from tokprune.testing.oracle import mask_tower, merges, steps_are_known

        try:
            with case.compress() as trace, recorded_layers(self.own) as seen, self.pinned():
                got = forced_logits(self.own, self.moved, self.continuation.to(self.device))
        except UnsupportedModelError as error:
            return {"status": "refused", "words": str(error)}
        except RuntimeError as error:
            if not no_kernel(error):
                raise
            return {"status": "no kernel", "words": str(error).splitlines()[0]}
        prefill, entered, got = on_cpu(last_of(trace)), on_cpu(seen), got.float().cpu()
        length = self.inputs["input_ids"].shape[1]
        if any(int(layer.slot.max()) >= length for layer in prefill.layers):
            return {"status": "no oracle", "words": "more tokens than the prompt has places"}
        merged = merges(prefill)
        known = 1 if merged and not steps_are_known(prefill) else None

        def oracle(model: Any, inputs: dict[str, Tensor], seen: Any) -> Tensor:
            handles = mask_tower(model, prefill)
            try:
                logits = generated_oracle(
                    model, inputs, prefill, self.continuation, seen, case.method.rectify
                )
            finally:
                for handle in handles:
                    handle.remove()
            return logits[:, :known].float()

        got = got[:, :known]
        want = oracle(self.cpu, self.inputs, entered if merged else None)
        apart = _apart(got, want)
        error, contrast = self._error(apart), _apart(self.plain[:, : got.shape[1]], want)
        rounding = self.rounding
        if error > SLACK * max(rounding, LEAST) and self.dtype is not torch.float32 and not merged:
            low = copy.deepcopy(self.cpu).to(self.dtype)
            inputs = {n: v.to(self.dtype) if v.is_floating_point() else v
                      for n, v in self.inputs.items()}  # fmt: skip
            rounding = max(rounding, self._error(_apart(oracle(low, inputs, None), want)))
        allowed = SLACK * max(rounding, LEAST)
        return {
            "status": "equal" if error <= allowed else "wrong", "error": error,
            "worst": float(apart.max()), "contrast": float(contrast.median()),
            "allowed": allowed, "rounding": rounding, "merged": merged,
        }  # fmt: skip


def _apart(got: Tensor, want: Tensor) -> Tensor:
    """[B, tokens] largest difference of a token's logits as a share of the largest logit; a huge
    one where a logit is no number."""
    apart = (got - want).abs().amax(-1) / want.abs().max()
    return apart.nan_to_num(nan=1e30, posinf=1e30)


def on_cpu(value: Any, known: dict[int, Any] | None = None) -> Any:
    """A copy of nested dataclasses, lists, tuples and dictionaries with all tensors on the CPU,
    those of a half precision in float32."""
    known = {} if known is None else known
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        return value.float() if value.is_floating_point() else value
    if id(value) in known:
        return known[id(value)]
    if isinstance(value, dict):
        return {name: on_cpu(own, known) for name, own in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(on_cpu(own, known) for own in value))
    if isinstance(value, (list, tuple)):
        return type(value)(on_cpu(own, known) for own in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        made = known[id(value)] = copy.copy(value)
        for name in vars(value):  # frozen ones, too
            object.__setattr__(made, name, on_cpu(getattr(value, name), known))
        return made
    return value
