"""Sweeps whose questions lmms-eval asks: its tasks, its prompts, its metrics; our cells."""

from __future__ import annotations

from tokprune.sweep.lmms.answering import LmmsHarness

__all__ = ["LmmsHarness"]
