"""Every image-text-to-text class of transformers is supported, or refused with a reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as CLASSES,
)

import tokprune
from tokprune.cli import app
from tokprune.engine.compat import RELEASE
from tokprune.families import REFUSED, bind, family_of, supported_models

#: the release that the tables were last gone through with, and known classes outside its mapping
NEWEST = (5, 24)
OUTSIDE = {"Phi4MultimodalForCausalLM"}


def test_nothing_is_unknown_and_nothing_has_gone() -> None:
    here = set(CLASSES.values())
    supported = {name for name in supported_models() if hasattr(transformers, name)}
    new = sorted(here - set(REFUSED) - set(supported_models()))
    gone = sorted(set(REFUSED) - OUTSIDE - here) if RELEASE >= NEWEST else []
    lost = sorted(
        name
        for name in supported_models()
        if name.endswith("ForConditionalGeneration") and name not in supported
    )
    lost = lost if RELEASE >= NEWEST else []
    moved = [*new, *gone, *lost]
    assert not moved, (
        f"transformers {transformers.__version__} moved. New classes, to be supported or refused "
        f"with a reason in tokprune/families/refused.py: {', '.join(new) or 'none'}. Refused "
        f"classes that it no longer has: {', '.join(gone) or 'none'}. Supported classes that it no "
        f"longer has: {', '.join(lost) or 'none'}."
    )


def test_reasons_are_sentences() -> None:
    assert not set(REFUSED) & set(supported_models())
    for name, reason in REFUSED.items():
        assert len(reason) > 20, name
        assert "{" not in reason, name
        assert not reason.endswith("."), name
        assert "\n" not in reason, name


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("Mllama", "cross-attention"),
        ("Gemma3n", "parallel streams"),
        ("Chameleon", "discrete tokens"),
        ("Janus", "not supported yet"),
        ("Blip2", "query tokens"),
    ],
)
def test_patching_and_loading_say_why(
    name: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = f"{name}ForConditionalGeneration"
    cls = getattr(transformers, full)
    model = cls.__new__(cls)  # building one takes a config of its own
    for call in (family_of, bind, lambda m: tokprune.patch(m, "random", keep=4)):
        with pytest.raises(tokprune.UnsupportedModelError, match=told):
            call(model)
    kind = cls.config_class.model_type
    for config in ({"model_type": kind, "architectures": [full]}, {"model_type": kind}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(tokprune.UnsupportedModelError, match=rf"{full} is not .*{told}"):
            tokprune.load(tmp_path, "random", keep=4)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        app(["run", "--model", str(tmp_path), "--prompt", "what ?"])
    assert told in capsys.readouterr().err
