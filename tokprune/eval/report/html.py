"""The report as one HTML page that needs nothing else: no scripts, no fonts, no network."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from tokprune.eval.report.document import Document


def write_html(document: Document, path: Path) -> Path:
    """Write the page. All text of others (questions, answers, names) is escaped."""
    from jinja2 import Environment, StrictUndefined

    source = (
        resources.files("tokprune.eval.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    )
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["kind"] = lambda block: type(block).__name__.lower()
    page = environment.from_string(source).render(document=document)
    path.write_text(page, encoding="utf-8")
    return path
