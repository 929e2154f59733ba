"""Sweeps whose questions lmms-eval asks: its tasks, its prompts, its metrics; our cells."""

from __future__ import annotations

from tokprune.integrations.lmms_eval.driver.answering import LmmsHarness

__all__ = ["LmmsHarness"]
