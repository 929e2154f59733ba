"""Checks of golden cases, one module per method; ``CHECKS`` maps operator name to check."""

from importlib import import_module
from pkgutil import iter_modules

from tokprune.methods.registry import available_methods

CHECKS = {}
for _module in iter_modules(__path__):
    CHECKS.update(getattr(import_module(f"golden_checks.{_module.name}"), "CHECKS", {}))


def reason_not_known(operator: str, folder: str | None = None) -> str | None:
    """Why there is no check of an operator of a file in ``folder``; None: there should be one."""
    methods = available_methods()
    prefix = operator.split(".")[0] if "." in operator else None
    named = [name for name in (folder, prefix) if name is not None and name not in methods]
    return f"method {named[0]} is not in this version" if named else None
