"""What the checks found, in words."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from tokprune.errors import UnsupportedModelError, UnsupportedVideoError


class Fault(AssertionError):
    """A check failed; the text says what was compared, how far off it is and where to look."""


@dataclass(frozen=True)
class Check:
    """One check on one family."""

    #: what was checked
    name: str
    #: name of the family; "" for what needs no model
    family: str
    #: whether it holds; also True for what a method refuses or does not have, which ``words`` say
    passed: bool
    #: what was found
    words: str


@dataclass
class Report:
    """All that :func:`tokprune.testing.check_method` or ``check_family`` found; ``str`` of it is a
    table."""

    #: what was checked: a method's configuration, or a family
    subject: str
    checks: list[Check] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def failures(self) -> list[Check]:
        return [check for check in self.checks if not check.passed]

    def run(self, name: str, family: str, check: Callable[[], str]) -> bool:
        """Add what a check found: its words, or those of the error that it raised.

        An ``UnsupportedModelError`` or ``UnsupportedVideoError`` is a refusal and no failure, and
        so is a ``ValueError`` of a method's ``plan``.

        Returns:
            False if the check failed or was refused.
        """
        words, passed, going = "", True, False
        try:
            words, going = check(), True
        except Fault as fault:
            words, passed = str(fault), False
        except (UnsupportedModelError, UnsupportedVideoError) as error:
            words = f"refused: {error}"
        except Exception as error:
            passed = name.endswith("plan") and type(error) is ValueError
            words = f"refused: {error}" if passed else _raised(error)
        self.checks.append(Check(name, family, passed, words))
        return going

    def raise_for_failures(self) -> None:
        """Raise if a check failed.

        Raises:
            AssertionError: lists every failure in words.
        """
        if self.failures:
            lines = [f"{self.subject}: {len(self.failures)} of {len(self.checks)} checks failed"]
            lines += [f"- {_where(check)}: {check.words}" for check in self.failures]
            raise AssertionError("\n".join(lines))

    def __str__(self) -> str:
        wide = max((len(_where(check)) for check in self.checks), default=0)
        lines = [
            f"{'ok  ' if check.passed else 'FAIL'}  {_where(check):{wide}}  {check.words}"
            for check in self.checks
        ]
        failed = len(self.failures)
        verdict = f"{failed} of {len(lines)} failed" if failed else f"all {len(lines)} passed"
        return "\n".join([self.subject, *lines, verdict])


def _where(check: Check) -> str:
    return f"{check.family}: {check.name}" if check.family else check.name


def _raised(error: Exception) -> str:
    """An exception in words, with the innermost line outside torch and transformers."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "/site-packages/torch/" not in frame.filename
        and "/site-packages/transformers/" not in frame.filename
    ]
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"raised {type(error).__name__}{place}: {error}"


def placed(error: Tensor) -> str:
    """Where the largest error of [B, 1 + steps, V] or [B, V] logits is, in words."""
    per_step = error.flatten(2).amax(2) if error.dim() == 3 else error.amax(1, keepdim=True)
    row, step = divmod(int(per_step.argmax()), per_step.shape[1])
    at = f"step {step} after the prompt" if step else "the end of the prompt"
    return f", most in batch row {row} at {at}"
