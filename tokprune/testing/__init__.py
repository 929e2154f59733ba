"""For people who write methods and families of their own: what a pull request must pass.

:func:`check_method` and :func:`check_family` run everything on tiny random models and report in
words; the pieces that they are made of (tiny models, prompts, the masked oracle, single checks)
can be used alone. Needs torch and transformers, and no test runner.
"""

from tokprune.testing.case import Case
from tokprune.testing.families import default_families
from tokprune.testing.family import check_family
from tokprune.testing.method import check_method
from tokprune.testing.oracle import (
    assert_same_logits,
    compressed_logits,
    continuation_tokens,
    oracle_logits,
)
from tokprune.testing.prompts import make_inputs, take_row
from tokprune.testing.report import Check, Fault, Report
from tokprune.testing.tiny import (
    TinyFamily,
    register_tiny,
    tiny_families,
    tiny_family,
)

__all__ = [
    "Case",
    "Check",
    "Fault",
    "Report",
    "TinyFamily",
    "assert_same_logits",
    "check_family",
    "check_method",
    "compressed_logits",
    "continuation_tokens",
    "default_families",
    "make_inputs",
    "oracle_logits",
    "register_tiny",
    "take_row",
    "tiny_families",
    "tiny_family",
]
