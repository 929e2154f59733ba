"""The report in a real browser: it needs nothing from elsewhere, and shows what it should."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import browser
import fake_run
import numpy as np
import pytest
from PIL import Image

from tokprune.eval.report import build_report

pytestmark = pytest.mark.skipif(browser.find() is None, reason="no Chromium on this machine")
COUNT = 108


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirteen variants at five budgets."""
    folder = fake_run.make_run(
        tmp_path_factory.mktemp("run"), count=COUNT, methods=fake_run.METHODS,
        budgets=fake_run.BUDGETS, overlays=1, failed=1,
    )  # fmt: skip
    return build_report(folder, benchmark=fake_run.FakeBenchmark(COUNT), draws=100).html


class _Page(HTMLParser):
    """Everything that could make a browser fetch something, and the headings."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.sections: list[str] = []
        self.tags: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        given = dict(attrs)
        for name in ("src", "href", "xlink:href", "srcset", "data", "poster", "action"):
            value = given.get(name)
            if value is not None and not value.startswith(("#", "data:image/")):
                self.fetched.append(f"{tag} {name}={value[:60]}")
        if tag == "section":
            self.sections.append(given.get("id") or "")


def test_dom(page: Path) -> None:
    text = browser.dom(page)
    seen = _Page()
    seen.feed(text)
    assert seen.fetched == []
    assert seen.sections == [
        "summary", "plots", "results", "tasks", "oracle", "differences", "groups", "noise",
        "gallery", "exceptions", "environment",
    ]  # fmt: skip
    assert "script" not in seen.tags
    assert seen.tags["svg"] == 2 * 6  # wide and narrow
    assert seen.tags["img"] == 1 + len(fake_run.METHODS) + 3  # no overlay of downsample
    assert seen.tags["table"] >= 10
    for variant in (*fake_run.METHODS, *fake_run.CONTROLS):
        assert len(re.findall(rf">{variant}\b", text)) >= 5
    assert not re.search(r"https?://(?!www\.w3\.org/)", text)


def test_desktop(page: Path, tmp_path: Path) -> None:
    shot = browser.screenshot(page, tmp_path / "desk.png", 1280, 4000)
    with Image.open(shot) as image:
        assert image.size == (1280, 4000)
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert (pixels[:40, :, :] > 250).mean() > 0.9  # dark on light
    filled = (pixels.min(2) < 240).any(1)
    assert filled.mean() > 0.5  # rows with something in them
    assert len(np.unique(pixels[::4] @ (65536, 256, 1))) > 200  # plots in colour
    assert (pixels[:, :30].min(2) > 200).all()  # nothing sticks out at the left


def test_phone(page: Path, tmp_path: Path) -> None:
    """At 400 pixels nothing makes the page wider: tables scroll inside their containers."""
    frame = browser.framed(page, tmp_path / "phone.html", 400, 3000)
    shot = browser.screenshot(frame, tmp_path / "phone.png", 700, 3000)
    with Image.open(shot) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert (pixels[:, 402:] > 250).all()
    assert (pixels[:, :400].min(2) < 240).any(1).mean() > 0.5
    # the narrow plots are shown, so their axes end inside the screen
    assert (pixels[:, 390:400].min(2) > 200).mean() > 0.95
    wider = tmp_path / "wider.html"
    probe = (
        "<script>addEventListener('load',()=>{document.title='width '+"
        "document.documentElement.scrollWidth+' of '+innerWidth})</script></body>"
    )
    wider.write_text(page.read_text().replace("</body>", probe))
    title = re.search(r"<title>width (\d+) of (\d+)</title>", browser.dom(wider))
    assert title is not None
    assert int(title[1]) <= int(title[2])
