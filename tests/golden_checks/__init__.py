"""Checks of golden cases, one module per method; ``CHECKS`` maps operator name to check."""

from importlib import import_module

MODULES = (
    "cdpruner",
    "centerclip",
    "dart",
    "divprune",
    "fastv",
    "flowcut",
    "m3",
    "mustdrop",
    "pitome",
    "pyramiddrop",
    "sparsevlm",
    "todre",
    "tome",
    "transprune",
    "visionzip",
)

CHECKS = {}
for _name in MODULES:
    CHECKS.update(import_module(f"golden_checks.{_name}").CHECKS)

#: Operators of the golden format that this version does not have, and why.
NOT_YET = {"flowcut.e2e_qwen2vl": "no Qwen2-VL family yet: only its operators are here"}


def reason_not_known(operator: str) -> str | None:
    return next((why for prefix, why in NOT_YET.items() if operator.startswith(prefix)), None)
