"""Every golden case against our operators and models.

``pytest tests/test_golden.py --golden-dir DIR`` runs any other folder of the same format.
"""

import warnings
from pathlib import Path

import pytest
from golden_checks import CHECKS, reason_not_known
from golden_checks.case import load_case

pytestmark = pytest.mark.golden


def test_golden(golden_file: Path, request: pytest.FixtureRequest) -> None:
    case = load_case(golden_file)
    root = request.config.getoption("--golden-dir")
    folder = golden_file.parent.name if golden_file.parent != root else None
    # operators of some files go without the method's name, which their folder has
    check = CHECKS.get(f"{golden_file.parent.name}.{case.operator}") or CHECKS.get(case.operator)
    if check is None:
        if reason := reason_not_known(case.operator, folder):
            pytest.skip(reason)
        pytest.fail(f"no check for operator {case.operator!r} of {golden_file}")
    check(case)
    assert case.compared, f"nothing of {golden_file} was compared"
    if overlooked := case.overlooked():
        own = golden_file.is_relative_to(Path(__file__).parent)
        message = f"{golden_file}: nothing looks at {overlooked}"
        pytest.fail(message) if own else warnings.warn(message, stacklevel=1)
