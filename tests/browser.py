"""A headless browser for tests of pages: screenshots and the DOM after loading."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars",
)  # fmt: skip


def find() -> str | None:
    """Path of a Chromium, None where there is none."""
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


def _call(page: Path, *options: str, timeout: int = 300) -> str:
    browser = find()
    assert browser is not None
    with tempfile.TemporaryDirectory() as profile:
        done = subprocess.run(
            [browser, *_FLAGS, f"--user-data-dir={profile}", *options, page.resolve().as_uri()],
            capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def screenshot(page: Path, target: Path, width: int, height: int) -> Path:
    """PNG of the page's first ``height`` pixels. (Chromium makes no window narrower than 500
    pixels: for a phone, open a page that holds this one in a frame; see :func:`framed`.)"""
    _call(page, f"--screenshot={target}", f"--window-size={width},{height}")
    return target


def dom(page: Path) -> str:
    """The document as HTML after scripts have run."""
    return _call(page, "--dump-dom")


def framed(page: Path, target: Path, width: int, height: int) -> Path:
    """A page that shows ``page`` in a frame of a given width, as a phone would."""
    target.write_text(
        f'<!doctype html><body style="margin:0"><iframe src="{page.resolve().as_uri()}" '
        f'style="border:0;width:{width}px;height:{height}px"></iframe>',
        encoding="utf-8",
    )
    return target
