"""Settings in the words of other engines: what they take, how near it is, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import family_processors
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tokprune.cli import app
from tokprune.errors import UnsupportedModelError
from tokprune.export import engines, export
from tokprune.integrations.engines import edge_llm, openvino, sglang
from tokprune.integrations.engines.shares import share_removed
from tokprune.methods import CDPruner, available_methods, make_method
from tokprune.methods.setting import save_setting

DART = {"visualPrune": True, "dartPivotImageTokens": 4, "dartPivotTextTokens": 4}


# -------------------------------------------------------------------------- what engines take


@pytest.mark.parametrize(
    ("to", "method", "options", "tokens", "want"),
    [
        ("openvino", "cdpruner", {"keep": 0.25}, None, (75, 0.0)),
        ("openvino", "cdpruner", {"keep": 0.333}, None, (67, 0.0)),
        ("openvino", "cdpruner", {"keep": 64, "relevance": "text"}, 576, (89, 1.0)),
        ("openvino", "cdpruner", {"keep": 0.5, "relevance": "text", "theta": 0.3}, 100, (50, 0.3)),
        ("openvino", "cdpruner", {"keep": 16, "positions": "preserve"}, 64, (75, 0.0)),
        ("sglang", "evs", {"keep": 0.3}, None, {"video_pruning_rate": 0.7}),
        ("sglang", "evs", {"keep": 9, "positions": "compact"}, 36, {"video_pruning_rate": 0.75}),
        ("edge-llm", "dart", {"keep": 0.75}, None, {**DART, "dartReductionRatio": 0.25}),
        ("edge-llm", "dart", {"keep": 64}, 256, {**DART, "dartReductionRatio": 0.75}),
        # 0.9 is a little less in its float32, and 11 would stay
        ("edge-llm", "dart", {"keep": 10}, 100, {**DART, "dartReductionRatio": 0.900001}),
        (
            "edge-llm", "dart", {"keep": 64, "text_pivots": 0, "image_pivots": 9}, 256,
            {**DART, "dartReductionRatio": 0.75, "dartPivotImageTokens": 9,
             "dartPivotTextTokens": 0},
        ),
    ],
)  # fmt: skip
def test_options(to: str, method: str, options: Any, tokens: int | None, want: Any) -> None:
    if isinstance(want, tuple):
        want = {"pruning_ratio": want[0], "relevance_weight": want[1]}
    found = export(method, to, tokens=tokens, **options)
    assert found.options == want
    assert found.nearness
    for value in found.options.values():
        assert value is True or str(value) in found.how


def test_what_is_not_the_same_depends_on_the_setting() -> None:
    def said(*given: Any, **options: Any) -> str:
        return "\n".join(export(*given, **options).nearness)

    plain = said("cdpruner", "openvino", keep=0.5)
    assert "rounding decides" in plain
    assert "cosine" not in plain
    asked = said("cdpruner", "openvino", keep=0.5, relevance="text")
    assert "cosine with the mean embedding" in asked
    assert "kernel" not in asked
    weighed = said("cdpruner", "openvino", keep=0.5, relevance="text", theta=0.25)
    assert "the plain one (0.75) and the one weighted by relevance (0.25)" in weighed
    assert "pivot_order='official'" in said("dart", "edge-llm", keep=0.5)
    assert "pivot_order" not in said("dart", "edge-llm", keep=0.5, pivot_order="norm")
    assert "not before layer 5" in said("dart", "edge-llm", keep=0.5, prune_before=5)
    counts = said("cdpruner", "openvino", keep=64, tokens=576)
    assert "63 of 576 tokens stay, 64 in tokprune" in counts


def test_forms_of_a_setting_are_one(tmp_path: Path) -> None:
    file = tmp_path / "setting.json"
    setting = {"schema": 2, "method": "cdpruner", "options": {"keep": 0.25}}
    save_setting(setting, file)
    found = [
        export(form, "openvino")
        for form in (file, str(file), setting, make_method("cdpruner", keep=0.25))
    ]
    assert all(own == export("cdpruner", "openvino", keep=0.25) for own in found)


# ------------------------------------------------------------------------- shares and counts


@given(st.integers(2, 20_000), st.data())
def test_no_more_stays_than_a_count_says(tokens: int, data: Any) -> None:
    keep = data.draw(st.integers(1, tokens - 1))
    for left in (edge_llm.tokens_left, sglang.tokens_left):
        stays = left(tokens, share_removed(keep, tokens, left))
        assert stays == keep
    least = openvino.tokens_left(tokens, 99)
    assume(keep >= least > 0)
    ratio = openvino.pruning_ratio(keep, tokens)
    stays = openvino.tokens_left(tokens, ratio)
    assert keep - tokens // 100 - 1 <= stays <= keep
    assert not any(stays < openvino.tokens_left(tokens, other) <= keep for other in range(1, 100))


@given(st.floats(0.01, 0.99), st.integers(2, 20_000))
def test_fractions_without_a_number_of_tokens(keep: float, tokens: int) -> None:
    ours = max(1, int(keep * tokens))
    ratio = openvino.pruning_ratio(keep, None)
    assert -1e-8 < keep - (1 - ratio / 100) < 0.01
    assert openvino.tokens_left(tokens, ratio) <= ours + 1
    up = edge_llm.tokens_left
    assert ours <= up(tokens, share_removed(keep, None, up)) <= ours + 2
    down = sglang.tokens_left
    # the first frame, which stays whole, is more than 0
    assert abs(max(1, down(tokens, share_removed(keep, None, down))) - ours) <= 1


@given(st.floats(1e-12, 1, exclude_max=True))
def test_shares_lie_between_0_and_1(keep: float) -> None:
    for left in (edge_llm.tokens_left, sglang.tokens_left):
        assert 0 < share_removed(keep, None, left) < 1


# ---------------------------------------------------------------------------------- models


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2-VL: a token is 8 pixels each way, an image at most 36 of them."""
    return family_processors.save(tmp_path_factory.mktemp("qwen"), "qwen2-vl")


def test_a_model_says_how_many_tokens_an_image_has(qwen: Path) -> None:
    for size, tokens in (((48, 48), 36), ((40, 32), 20), ((480, 480), 36)):
        found = export("cdpruner", "openvino", model=qwen, image_size=size, keep=10)
        assert found == export("cdpruner", "openvino", tokens=tokens, keep=10)
    assert export("cdpruner", "openvino", model=qwen, keep=0.5).options["pruning_ratio"] == 50


def test_models_in_which_an_engine_has_nothing_are_refused(qwen: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"Qwen2VLFor.*TensorRT.*one of Qwen2_5_VL"):
        export("dart", "edge-llm", model=qwen, keep=0.5)
    with pytest.raises(UnsupportedModelError, match=r"SGLang has evs; .* NemotronH_Nano_VL_V2"):
        export("evs", "sglang", model=qwen, keep=0.5)
    with pytest.raises(UnsupportedModelError, match=r"Llava.*should be one of Qwen2VL"):
        export("cdpruner", "openvino", model="mini", image_size=(9, 9), keep=5)
    with pytest.raises(OSError):
        export("cdpruner", "openvino", model=tmp_path / "nothing", keep=0.5)
    # its code is not run, and transformers need not know it
    (tmp_path / "config.json").write_text('{"architectures": ["NemotronH_Nano_VL_V2"]}')
    assert export("evs", "sglang", model=tmp_path, keep=0.5).options["video_pruning_rate"] == 0.5


# --------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("to", "method", "given", "words"),
    [
        ("vllm", "cdpruner", {"keep": 0.5}, "to='vllm' should be one of openvino, sglang, edge"),
        ("openvin", "cdpruner", {"keep": 0.5}, "Did you mean 'openvino'"),
        ("openvino", "cdpruner", {"keep": 64}, "keep=64 is a count.*--tokens.*--image-size"),
        ("openvino", "cdpruner", {"keep": 64, "tokens": 64}, "keep=64 of 64 tokens drops nothing"),
        ("edge-llm", "dart", {"keep": 1.0}, "keep=1.0 drops nothing"),
        ("openvino", "cdpruner", {"keep": 0.004}, "keep=0.004 should be at least 0.01"),
        ("openvino", "cdpruner", {"keep": 4, "tokens": 1000}, "less than the 10 .* at least 10"),
        ("openvino", "cdpruner", {"keep": 4, "tokens": 0}, "tokens=0 should be at least 1"),
        ("openvino", "cdpruner", {"keep": 4, "image_size": (9, 9)}, r"\(9, 9\) needs a model"),
        ("openvino", "cdpruner", {"keep": 4, "image_size": (9, 9), "tokens": 9}, "drop one"),
        ("sglang", "evs", {"keep": 4, "image_size": (9, 9)}, "nothing of a video.*--tokens"),
        ("openvino", "cdpruner", {"keep": 0.5, "centre": "plain"}, "centre='plain' of cdpruner"),
        (
            "openvino", "cdpruner", {"keep": 0.5, "relevance_scope": "call"},
            "relevance_scope='call'",
        ),
        ("openvino", "cdpruner", {"keep": 0.5, "positions": "compact"}, "use 'preserve'"),
        ("openvino", "cdpruner", {"keep": 0.5, "rectify": "size"}, "rectify=.*OpenVINO GenAI"),
        ("openvino", "cdpruner", {"keep": 0.5, "video_unit": 2}, "video_unit=2"),
        ("edge-llm", "dart", {"keep": 0.5, "centre": "plain"}, "centre='plain' of dart"),
        ("edge-llm", "dart", {"keep": 0.5, "positions": "compact"}, "use 'preserve'"),
        ("edge-llm", "dart", {"keep": 0.5, "image_pivots": 61}, "text_pivots=4 .* at most 64"),
        ("sglang", "evs", {"keep": 0.5, "positions": "preserve"}, "use 'compact'"),
    ],
)  # fmt: skip
def test_refusals(to: str, method: str, given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        export(method, to, **given)


def test_a_relevance_from_elsewhere_is_refused() -> None:
    method = CDPruner(keep=0.5, relevance=lambda image: image.features.sum(-1))
    with pytest.raises(ValueError, match=r"relevance=.*CLIP's text tower nor a hook; use 'text'"):
        export(method, "openvino")


def test_methods_that_an_engine_has_not_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"no dart, only cdpruner; .*--to edge-llm"):
        export("dart", "openvino", keep=0.5)
    with pytest.raises(
        UnsupportedModelError, match=r"no pyramiddrop, only dart\. .*vllm-overrides"
    ):
        export("pyramiddrop", "edge-llm")
    own = {cls.name for e in (openvino, sglang, edge_llm) for cls in e.ENGINE.methods}
    assert own == {"cdpruner", "evs", "dart"} <= set(available_methods())
    assert engines() == ["openvino", "sglang", "edge-llm"]


# ----------------------------------------------------------------------------- command line


def test_command(qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "setting.json"
    save_setting({"schema": 2, "method": "cdpruner", "options": {"keep": 9}}, file)
    want = {"pruning_ratio": 75, "relevance_weight": 0.0}
    for words in (
        [str(qwen), "--setting", str(file), "--image-size", "48x48"],
        ["--method", "cdpruner", "--keep", "9", "--tokens", "36"],
        ["--method", "cdpruner", "--keep", "1/4", "--option", "relevance=none"],
    ):
        with pytest.raises(SystemExit) as done:
            app(["export", "--to", "openvino", *words])
        assert not done.value.code
        out, err = capsys.readouterr()
        assert json.loads(out) == want
        assert "config.pruning_ratio = 75" in err
        assert "\n- with a video Qwen2-VL" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--to", "openvino"], "--setting FILE, or --method NAME"),
        (["--method", "cdpruner", "--keep", "9"], "--to"),
        (["--to", "tgi", "--method", "grid", "--keep", "9"], "to='tgi' should be one of openvino"),
        (["--to", "openvino", "--method", "grid", "--keep", "9"], "has no grid, only cdpruner"),
        (["--to", "openvino", "--method", "cdpruner", "--keep", "9,4"], "keep"),
        (
            ["--to", "openvino", "--method", "cdpruner", "--keep", "9", "--image-size", "9"],
            "--image-size '9' should be WIDTHxHEIGHT",
        ),
    ],
)
def test_bad_commands(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        app(["export", *words])
    assert done.value.code == 2
    assert said in capsys.readouterr().err


def test_no_engine_is_imported() -> None:
    code = (
        "import sys, tokprune.export as e; e.export('cdpruner', 'openvino', keep=0.5); "
        "print(*(n for n in ('openvino', 'openvino_genai', 'sglang', 'transformers') "
        "if n in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
