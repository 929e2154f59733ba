"""The package as a whole: typed, documented, and without unsafe formats."""

from __future__ import annotations

import importlib.metadata
from importlib.resources import files
from pathlib import Path

import tokprune
from tokprune.methods import available_methods
from tokprune.methods.registry import option_names

ROOT = Path(__file__).parent.parent


def test_package_is_marked_as_typed() -> None:
    assert (files("tokprune") / "py.typed").is_file()


def test_version_is_that_of_the_metadata() -> None:
    assert importlib.metadata.version("tokprune") == tokprune.__version__


def test_readme_lists_every_method_and_model() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in available_methods():
        assert f"(`{name}`)" in readme, f"README's table of methods lacks {name}"
    for model in tokprune.supported_models():
        assert model in readme


def test_no_page_holds_both_sides_of_a_merge() -> None:
    for page in (ROOT / "README.md", *ROOT.glob("*/**/*.md")):
        if any(part.startswith(".") for part in page.relative_to(ROOT).parts):
            continue  # environments
        lines = page.read_text(encoding="utf-8").splitlines()
        assert not [line for line in lines if line.startswith(("<<<<<<< ", ">>>>>>> "))], page


SHARED = {"video_unit", "rectify", "anchors"}


def test_every_method_documents_itself() -> None:
    for name, cls in available_methods().items():
        assert cls.__doc__, name
        for option in option_names(cls):
            text = cls.__doc__
            if option in SHARED:  # of many methods, documented once
                text = "".join(base.__doc__ or "" for base in cls.__mro__)
            assert f"{option}:" in text or f"{option}," in text, (
                f"{cls.__name__} does not document {option!r}"
            )
        assert cls.stages, name
        assert cls.paper or name == "random", name


def test_public_names_resolve() -> None:
    for name in tokprune.__all__:
        assert getattr(tokprune, name) is not None
