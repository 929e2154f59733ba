"""Golden checks of apet."""

from functools import partial

import torch

from golden_checks.case import Case
from tokprune.operators.apet import WriteBack, compress


def check(case: Case, write_back: WriteBack) -> None:
    p, x = case.parameters, case["features"]
    single = x.dim() == 2
    batch = x[None] if single else x
    start = torch.full((len(batch),), p["start"])
    got = compress(batch, p["keep"], p["basis"], start, p["ridge"], write_back)
    half = case.t["out"].dtype != torch.float32
    rtol = 1e-2 if half else 1e-4
    outputs = (
        (case.equal, "basis", got.basis), (case.equal, "kept", got.index),
        (partial(case.close, rtol=rtol), "out", got.out),
        (partial(case.close, rtol=1e-4), "errors", got.errors),
    )  # fmt: skip
    for compare, name, value in outputs:
        compare(value[0] if single else value, name)


#: the operators of this folder have names of one word
CHECKS = {
    "door": partial(check, write_back="door"),
    "layer": partial(check, write_back="layer"),
    "qwen": partial(check, write_back="qwen"),
}
