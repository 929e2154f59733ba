"""Part (a): prefills and steps of methods with fixed numbers do not wait for the device.

CUDA itself tells: ``torch.cuda.set_sync_debug_mode("error")`` raises at whatever waits. Two reads
of every prefill are part of the design and let through, as in
:mod:`tokprune.testing.checks.host_reads`: where the images are, and whether features were finite.
Which methods have fixed numbers is asked of that check, on the meta device.
"""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from gpu_parts.journal import ROOT, Journal, Skipped

#: host-side inputs of the models
_ON_HOST = ("image_sizes", "batch_num_images")


def run_waits(
    cases: dict[str, tuple[str, dict[str, Any]]], device: torch.device, seconds: float,
    journal: Journal,
) -> None:  # fmt: skip
    """A line for every method; one that waits where the unpruned model does not fails."""
    import time

    from tokprune.testing.checks.host_reads import can_find_host_reads

    end = time.perf_counter() + seconds
    with journal.part("waits", "waits/unpruned") as own:
        if not can_find_host_reads():
            raise Skipped("transformers 4 itself reads the placeholders")
        own["result"] = plain = _waits(None, device)
    if own["status"] != "ok":
        return
    with journal.part("waits", "waits/methods") as own:
        found: dict[str, Any] = {}
        own["result"] = found
        for case, (method, options) in cases.items():
            if time.perf_counter() > end and found:
                found[case] = {"status": "not reached"}
                continue
            found[case] = _checked(method, options, device, plain["places"])
        waiting = [case for case, told in found.items() if told["status"] == "waits"]
        if waiting:
            raise AssertionError(f"{', '.join(waiting)} wait for the device: see the result")


def _checked(
    method: str, options: dict[str, Any], device: torch.device, plain: list[str]
) -> dict[str, Any]:
    from tokprune.methods import make_method
    from tokprune.testing import Case, tiny_family
    from tokprune.testing.checks.host_reads import host_read

    tiny = tiny_family("llava-1.5")
    made = make_method(method, **options)
    read = host_read(Case(made, tiny, tiny.build(), _PROMPTS, [(24, 24)] * 2))
    if read is not None:
        return {"status": "adaptive", "words": read}
    told = _waits(made, device)
    own = [place for place in told["places"] if place not in plain]
    return {"status": "waits" if own else "never waits", **told}


_PROMPTS: list[list[Any]] = [[4, "image", 6]] * 2


def _waits(method: Any, device: torch.device) -> dict[str, Any]:
    """``places`` that wait in a prefill and a step (none on a CPU), and the first that raises in
    the mode "error"."""
    places: list[str] = []
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        _forward(method, device, "warn")
    for warning in seen:
        if "synchronizing" in str(warning.message):
            places.append(_short(warning.filename, warning.lineno))
    first = None
    try:
        _forward(method, device, "error")
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        frame = traceback.extract_tb(error.__traceback__)[-1]
        first = f"{_short(frame.filename, frame.lineno or 0)}, {frame.line!r}"
    return {"places": sorted(set(places)), "error_mode": first}


def _short(filename: str, line: int) -> str:
    path = Path(filename)
    if path.is_relative_to(ROOT):
        return f"{path.relative_to(ROOT).as_posix()}:{line}"
    return f"{'/'.join(path.parts[-3:])}:{line}"


def _forward(method: Any, device: torch.device, mode: str) -> None:
    """A prefill and a cached step in a mode of ``set_sync_debug_mode``."""
    from contextlib import nullcontext

    from tokprune.api import compress
    from tokprune.engine import entry, session
    from tokprune.engine.cache import cache_argument
    from tokprune.testing import tiny_family

    tiny = tiny_family("llava-1.5")
    model = tiny.build()
    inputs = tiny.inputs(model, _PROMPTS, [(24, 24)] * 2)
    del inputs["attention_mask"]  # transformers looks whether it hides anything
    model.to(device)
    moved = {n: v if n in _ON_HOST else v.to(device) for n, v in inputs.items()}
    step = torch.zeros(len(_PROMPTS), 1, dtype=torch.long, device=device)
    with ExitStack() as stack:
        for module, name in ((entry, "read_layout"), (session, "_check_finite")):
            own = _allowed(getattr(module, name), device, mode)
            stack.enter_context(mock.patch.object(module, name, own))
        for cls in type(model).__mro__:
            module = sys.modules[cls.__module__]
            if hasattr(module, "torch_compilable_check"):  # placeholders against features
                stack.enter_context(mock.patch.object(module, "torch_compilable_check"))
        work = nullcontext() if method is None else compress(model, method, validate=False)
        with work, torch.no_grad(), _mode(device, mode):
            out = model(**moved, use_cache=True)
            given = {cache_argument(model): out.past_key_values}
            model(input_ids=step, use_cache=True, **given)


@contextmanager
def _mode(device: torch.device, mode: str) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _allowed(function: Callable[..., Any], device: torch.device, mode: str) -> Any:
    def call(*arguments: Any, **options: Any) -> Any:
        with _mode(device, "default"):
            return function(*arguments, **options)

    return call
