"""The bench beyond one answer: lengths of answers, where time goes, energy, videos, limits."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from rich.console import Console
from test_bench_released import small

import tokprune
from tokprune.bench import energy
from tokprune.bench.growth import exponent, growth
from tokprune.bench.instrumented import Place, Stopwatch
from tokprune.bench.measure import Variant, measure
from tokprune.bench.models import PRESETS, frames_of, image_of, random_model, skeleton
from tokprune.bench.prompts import default_image, encode, prompt
from tokprune.bench.released import VIDEOS
from tokprune.bench.run import bench
from tokprune.bench.split import SPLIT, split
from tokprune.bench.table import tables
from tokprune.methods import make_method


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.llava()


@pytest.fixture(scope="module")
def result(model: Any) -> dict[str, Any]:
    return bench(
        model, ["fastv", "pitome"], [9], rounds=6, new_tokens=(2, 5), batch_sizes=(1, 2),
        text_tokens=(8,),
    )  # fmt: skip


def shown(result: dict[str, Any]) -> str:
    console = Console(width=100, record=True, file=io.StringIO())
    for part in tables(result):
        console.print(part, highlight=False, markup=False)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 100
    return text


# ------------------------------------------------------------------------------ lengths


def test_lengths_of_answers_are_a_side_of_the_grid(result: dict[str, Any]) -> None:
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["settings"]["new_tokens"] == [2, 5]
    grid = [(p["batch_size"], p["new_tokens"]) for p in result["points"]]
    assert grid == [(1, 2), (1, 5), (2, 2), (2, 5)]
    measured = [list(p["noise_floor"]) for p in result["points"]]
    whole = ["encoder", "prefill", "decode_per_token", "total"]
    assert measured == [
        whole, ["encoder", "prefill", "total"], ["prefill", "total"], ["prefill", "total"],
    ]  # fmt: skip
    for trial in result["trials"]:
        by = trial["break_even_by_new_tokens"]
        assert list(by) == ["2", "5"]
        assert by["2"] == trial["break_even"]
        for own in by.values():
            assert [load["batch_size"] for load in own["measured"]] == [1, 2]


def test_one_length_is_one_number_as_before(model: Any) -> None:
    found = bench(model, ["random"], [9], rounds=1, new_tokens=2, batch_sizes=(1,),
                  text_tokens=(8,))  # fmt: skip
    assert found["settings"]["new_tokens"] == [2]
    assert [p["new_tokens"] for p in found["points"]] == [2]
    assert "new: " not in shown(found)


def test_nothing_is_decoded_for_a_prefill(model: Any) -> None:
    inputs = tiny.make_inputs(model, [[4, "image", 6]])
    forwards: list[int] = []
    watch = model.model.register_forward_pre_hook(
        lambda m, args, call: forwards.append(call["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        for parts, tokens in ((("prefill",), [46]), (("decode_per_token",), [46, 1, 1])):
            forwards.clear()
            variants = {"none": Variant.of(model, None)}
            measure(model, inputs, variants, 1, 3, parts=parts, warmup=0)
            assert forwards == tokens
    finally:
        watch.remove()


def test_bad_lengths_parts_and_limits_are_named(model: Any) -> None:
    for given, said in (
        ({"new_tokens": ()}, "new_tokens is empty"),
        ({"new_tokens": (4, 0)}, "new_tokens=0"),
        ({"new_tokens": (4, 4)}, "twice"),
        ({"parts": ("encoder",)}, "prefill or total"),
        ({"parts": ("prefill", "tail")}, "'tail'"),
        ({"seconds": 0}, "seconds=0"),
        ({"frames": 1}, "frames=1"),
        ({"frames": 4}, "no videos are made for llava"),
    ):
        with pytest.raises(ValueError, match=said):
            bench(model, ["random"], [9], **given)  # type: ignore[arg-type]


def test_time_limit_ends_after_a_round_and_says_what_was_left_out(model: Any) -> None:
    found = bench(
        model, ["random"], [9], rounds=50, new_tokens=2, batch_sizes=(1, 2), text_tokens=(8,),
        seconds=1e-6,
    )  # fmt: skip
    first, second = found["points"]
    assert {len(own) for parts in first["seconds"].values() for own in parts.values()} == {1}
    assert "limit of 1e-06 seconds" in second["error"]
    assert [load["batch_size"] for load in found["trials"][0]["break_even"]["measured"]] == [1]
    assert "limit of" in shown(found)


def test_a_choice_of_parts_pays_by_prefill(model: Any) -> None:
    found = bench(
        model, ["random"], [9], rounds=2, new_tokens=2, batch_sizes=(1,), text_tokens=(8,),
        parts=("encoder", "selection", "prefill"),
    )  # fmt: skip
    assert found["settings"]["break_even_by"] == "prefill"
    (point,) = found["points"]
    assert list(point["noise_floor"]) == ["encoder", "prefill"]
    assert point["unpruned_split"] is None
    assert "pays (prefill)" in shown(found)
    assert found["unpruned"]["energy"]["reason"] == "no whole answers were measured"


# ------------------------------------------------------------------------------ splits


def test_splits_add_up_and_the_bound_is_total_over_encoder(result: dict[str, Any]) -> None:
    for point in result["points"][:2]:
        seconds = point["seconds"]
        splits = {"none": point["unpruned_split"]}
        splits |= {name: own["split"] for name, own in point["trials"].items()}
        for name, own in splits.items():
            assert math.isclose(sum(own[part] for part in SPLIT), own["total"])
            ratios = [t / e for t, e in zip(seconds["none"]["total"], seconds[name]["encoder"])]
            assert min(ratios) <= own["bound"]["low"] <= own["bound"]["median"] <= max(ratios)
            assert own["bound"]["n"] == 6
        assert splits["none"]["selection"] == 0
        assert splits["pitome@9"]["selection"] > 0
    assert result["points"][2]["unpruned_split"] is None
    text = shown(result)
    assert text.count("Where the time goes") == 2
    assert "infinitely fast" in text


def test_selection_inside_the_encoder_is_taken_out_of_the_encoder() -> None:
    plain = {"encoder": [4.0], "prefill": [10.0], "total": [16.0]}
    own = {"encoder": [5.0], "prefill": [8.0], "total": [12.0], "selection": [3.0],
           "selection_in_encoder": [2.0]}  # fmt: skip
    found = split(plain, own)
    assert found is not None
    assert [found[part] for part in SPLIT] == [3.0, 3.0, 2.0, 4.0]
    assert found["bound"]["median"] == 16 / 5
    assert split(plain, {"prefill": [1.0], "total": [2.0]}) is None


def test_stopwatch_knows_the_part() -> None:
    watch = Stopwatch(torch.device("cpu"))
    for part in ("encoder", "prompt", "encoder"):
        assert watch(Place(part, 0, "select"), lambda: 7) == 7  # type: ignore[arg-type]
    assert set(watch.by_part) == {"encoder", "prompt"}
    assert watch.seconds == sum(watch.by_part.values()) > 0


def test_results_of_schema_2_are_still_shown(result: dict[str, Any]) -> None:
    old = json.loads(json.dumps(result))
    old["schema"], old["settings"]["new_tokens"] = 2, 2
    del old["settings"]["parts"], old["settings"]["seconds"]
    old["points"] = [p for p in old["points"] if p["new_tokens"] == 2]
    for point in old["points"]:
        del point["new_tokens"], point["unpruned_split"]
        for own in point["trials"].values():
            del own["split"]
    for trial in (old["unpruned"], *old["trials"]):
        del trial["energy"]
        trial.pop("break_even_by_new_tokens", None)
    text = shown(old)
    assert "2 new tokens" in text
    assert "Where the time goes" not in text
    assert "Energy" not in text


# ------------------------------------------------------------------------------ energy


def test_without_a_counter_there_is_a_reason_and_no_number(
    result: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for trial in (result["unpruned"], *result["trials"]):
        assert trial["energy"] == {"joules": None, "reason": "no energy counter is read on cpu"}
    assert "Energy: not measured (no energy counter is read on cpu)" in shown(result)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    told = energy.energy_per_answer(lambda: pytest.fail("work was done"), torch.device("cuda"))
    assert told["joules"] is None
    assert "pip install nvidia-ml-py" in told["reason"]


class Driver(ModuleType):
    """What NVML says of a GPU that takes 1,500 mJ between two looks."""

    NVMLError = type("NVMLError", (Exception,), {})

    def __init__(self, supported: bool = True) -> None:
        super().__init__("pynvml")
        self.supported, self.millijoules, self.asked = supported, 0, ""

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self.asked = uuid
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        if not self.supported:
            raise self.NVMLError("Not Supported")
        self.millijoules += 1500
        return self.millijoules


def test_energy_is_the_counter_s_difference_per_answer(
    monkeypatch: pytest.MonkeyPatch, result: dict[str, Any]
) -> None:
    driver, answers = Driver(), []
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    monkeypatch.setattr(energy, "synchronise", lambda device: None)
    monkeypatch.setattr(energy, "LEAST_SECONDS", 0.02)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abc")
    )
    told = energy.energy_per_answer(lambda: answers.append(1), torch.device("cuda"))
    assert driver.asked == "GPU-abc"
    assert told["answers"] == len(answers) > 1
    assert told["joules"] == 1.5 / len(answers)
    assert told["seconds"] >= 0.02
    monkeypatch.setitem(sys.modules, "pynvml", Driver(supported=False))
    refused = energy.energy_per_answer(lambda: None, torch.device("cuda"))
    assert refused["joules"] is None
    assert "Not Supported" in refused["reason"]
    known = json.loads(json.dumps(result))
    for number, trial in enumerate((known["unpruned"], *known["trials"])):
        trial["energy"] = {**told, "joules": 10.5 + number}
    text = shown(known)
    assert "joules" in text
    assert "12.5" in text
    assert energy.SOURCE in text.replace("\n", " ")


# ------------------------------------------------------------------------------ growth


def test_exponent_of_a_power_is_that_power() -> None:
    sizes = [3, 8, 20, 50]
    assert math.isclose(exponent(sizes, [5 * n**1.7 for n in sizes]), 1.7)
    noise = (1.0, 1.1, 0.9, 1.05, 0.95, 1.0)
    found = growth({n: [2 * n**2 * (f if n == 8 else 1) for f in noise] for n in sizes})
    assert found["sizes"] == sizes
    assert found["exponent"]["low"] <= 2 <= found["exponent"]["high"]
    assert found["exponent"]["low"] > 1.9
    assert [math.isclose(b, 2, rel_tol=0.01) for b in found["between"]] == [True] * 3


@pytest.mark.parametrize(
    ("rounds", "said"),
    [
        ({4: [1.0]}, "at least two"),
        ({4: [1.0], 5: []}, "should have as many"),
        ({4: [1.0], 5: [0.0]}, "positive"),
    ],
)
def test_growth_needs_sizes_and_times(rounds: dict[int, list[float]], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        growth(rounds)


# ------------------------------------------------------------------------------ videos


def toy(name: str) -> Any:
    """A video's shape with the widths of a toy: 5 frames of 4 × 5 cells, 3 times of 20 tokens."""
    return small(name).changed({}, {}, frames=5)


@pytest.mark.parametrize("name", ["qwen2.5-vl-7b", "qwen3-vl-8b"])
def test_videos_are_what_the_model_takes(name: str) -> None:
    shape = toy(name)
    model = random_model(shape)
    encoded = encode(model, default_image(shape.size), frames=shape.frames)
    assert encoded.tokens == 60
    inputs = prompt(model, encoded, 12, 2)
    assert int((inputs["input_ids"] == 251).sum()) == 120
    assert inputs["video_grid_thw"].tolist() == [[3, 8, 10]] * 2
    group = encoded.inputs["pixel_values_videos"].view(3, 80, -1)
    assert not torch.equal(group[0], group[1])  # it moves
    with torch.inference_mode():
        logits = model(**inputs).logits
        with tokprune.compress(model, make_method("divprune", keep=0.25)) as trace:
            model(**inputs)
    assert logits.isfinite().all()
    assert torch.equal(logits[0], logits[1])
    assert trace.last is not None
    assert trace.last.layers[-1].counts == [[15], [15]]


def test_released_videos_have_about_16000_tokens() -> None:
    for name in VIDEOS:
        assert frames_of(name) == 64
        encoded = encode(skeleton(name), image_of(name), frames=frames_of(name))
        assert encoded.tokens == 16384
    assert frames_of("llava-1.5-7b") == frames_of("qwen2.5-vl-7b") == 0


@pytest.mark.parametrize("name", VIDEOS)
def test_command_line_measures_videos(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokprune.cli import app

    monkeypatch.setitem(PRESETS, name, toy(name.removesuffix("-video")))
    options = {
        "--random-weights": name, "--methods": "fastv,divprune", "--keep": "1/4", "--rounds": "1",
        "--new-tokens": "2,3", "--batch-sizes": "2", "--text-tokens": "16", "--threads": "1",
        "--device": "cpu", "--json": str(tmp_path / "bench.json"),
    }  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        app(["bench", *[x for pair in options.items() for x in pair]])
    assert stop.value.code == 0
    assert "60 visual tokens" in capsys.readouterr().out
    result = json.loads((tmp_path / "bench.json").read_text())
    assert [p["new_tokens"] for p in result["points"]] == [2, 3]
    assert [trial["tokens_last"] for trial in result["trials"]] == [15, 15]
    assert result["points"][0]["trials"]["fastv@0.25"]["split"]["total"] > 0
