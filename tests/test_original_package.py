"""Models of the original ``llava`` package where that package is not: every way in says what to
do. (How they work where it is: tests/llava, `scripts/dev.py test-llava`.)"""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

import tokprune

INSTALL = r"pip install --no-deps llava-torch==1\.2\.2\.post1 transformers==4\.37\.2"


def test_load_says_how_to_install_it(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match=INSTALL):
        tokprune.load(tmp_path, "flowcut", keep=128, package="llava")


def test_load_checks_the_method_first(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Did you mean 'flowcut'"):
        tokprune.load(tmp_path, "flowcutt", keep=128, package="llava")
    with pytest.raises(ValueError, match="Did you mean 'keep'"):
        tokprune.load(tmp_path, "flowcut", kep=128, package="llava")
    with pytest.raises(ValueError, match="package='llave'"):
        tokprune.load(tmp_path, "flowcut", keep=128, package="llave")


@pytest.mark.parametrize("name", ["LlavaLlamaForCausalLM", "LlavaMistralForCausalLM"])
def test_its_classes_are_refused_on_this_transformers(name: str) -> None:
    model = type(name, (nn.Module,), {})()
    with pytest.raises(tokprune.UnsupportedModelError, match=f"{name} is not supported.*4\\.37"):
        tokprune.patch(model, "flowcut", keep=128)
    assert name not in tokprune.supported_models()
