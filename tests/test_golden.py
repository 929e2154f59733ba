"""Every golden case against our operators and models.

``pytest tests/test_golden.py --golden-dir DIR`` runs any other folder of the same format.
"""

from pathlib import Path

import pytest
from golden_checks import CHECKS, reason_not_known
from golden_checks.case import load_case

pytestmark = pytest.mark.golden


def test_golden(golden_file: Path) -> None:
    case = load_case(golden_file)
    check = CHECKS.get(case.operator)
    if check is None:
        if reason := reason_not_known(case.operator):
            pytest.skip(reason)
        pytest.fail(f"no check for operator {case.operator!r} of {golden_file}")
    check(case)
