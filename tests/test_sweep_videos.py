"""Sweeps over videos: every method by name, budgets, frames as a control, reports, refusals."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sweep_case as case
import tiny
import tiny_processor
import torch
from PIL import Image

import tokprune
from tokprune.engine.shared_encoder import SharedEncoder
from tokprune.eval.benchmarks import load_benchmark
from tokprune.eval.recommend import recommend
from tokprune.eval.report import build_report, load_run
from tokprune.eval.report.gallery import on_mosaic
from tokprune.eval.sweep import Settings, run_sweep
from tokprune.eval.sweep.loaded_model import LoadedModel
from tokprune.eval.sweep.reduced_input import ReducedInput, evenly_spaced
from tokprune.families import bind
from tokprune.inputs.frames_processor import FramesProcessor
from tokprune.methods.setting import load_setting

FRAMES, CELLS = 4, 9
TOKENS = FRAMES * CELLS
#: reduce the vision tower's rows, which models that pool whole frames cannot have
IN_TOWER = {"ficoco", "flowcut", "mustdrop", "occamtoken", "pitome", "tome", "visionzip"}


pytestmark = pytest.mark.usefixtures("load_once")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("videos")
    for family in tiny.VIDEO_BUILDERS:
        tiny_processor.save_video(root / family, family, layers=6)
    case.make_videos(root, frames=FRAMES)
    case.make_model(root / "images", layers=6)
    case.make_benchmark(root / "stills")
    return root


@pytest.fixture
def sweep(home: Path, tmp_path: Path) -> Callable[..., Settings]:
    def make(model: str = "llava_next_video", out: str = "run", **changes: Any) -> Settings:
        benchmark = changes.pop("benchmark", home / "clips.jsonl")
        return case.settings(home / model, benchmark, tmp_path / out, **changes)

    return make


@pytest.fixture(scope="module")
def whole(home: Path, tmp_path_factory: pytest.TempPathFactory, loaded_once: Any) -> Any:
    """Every method and control of videos, by name, on both families."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoadedModel, "load", loaded_once)
        out = tmp_path_factory.mktemp("out")
        return {
            family: run_sweep(
                case.settings(
                    home / family, home / "clips.jsonl", out / family, methods=(),
                    keep=("1/2", 16), controls=True, noise=True, latency=True, latency_rounds=1,
                    limit=5, max_new_tokens=2,
                )
            )
            for family in tiny.VIDEO_BUILDERS
        }  # fmt: skip


# ----------------------------------------------------------------------------- contents


@pytest.mark.parametrize("family", tiny.VIDEO_BUILDERS)
def test_every_method_runs_by_name(whole: Any, family: str) -> None:
    run = whole[family]
    assert run.info["finished"]
    assert run.info["benchmark"]["media"] == "video"
    variants = {trial["variant"] for trial in run.trials.values()}
    assert variants == {*tokprune.available_methods(), "none", "blind", "downsample", "frames"}
    for name, trial in run.trials.items():
        rows = run.rows_of(name)
        if trial["variant"] in IN_TOWER:
            assert trial["status"] == "unreachable"
            assert "inside the vision tower" in trial["reason"]
        if trial["status"] == "unreachable":
            assert not rows
            continue
        assert [row["status"] for row in rows] == ["ok"] * 5, name
        measured = sum(row["tokens_mean"] for row in rows) / len(rows)
        assert measured == pytest.approx(trial["calibrated"]["tokens_mean"], abs=0.5), name
        plain = {row["item"]: row["macs"] for row in run.rows_of("none")}
        assert {row["item"]: row["macs_unpruned"] for row in rows} == plain
        if trial["method"] is not None:
            assert abs(measured - trial["budget"]) <= 0.5, name
            assert rows[0]["macs"] < rows[0]["macs_unpruned"]
    reached = {c["variant"] for c in run.trials.values() if c["method"] and c["status"] == "ok"}
    # 3×3 trials have one coarser scale, which is neither budget
    assert reached == set(tokprune.available_methods()) - IN_TOWER - {"pool", "m3"}


@pytest.mark.parametrize("family", tiny.VIDEO_BUILDERS)
def test_costs_of_the_unpruned_model_are_those_of_its_trace(
    whole: Any, family: str, home: Path
) -> None:
    """Counted from the shape alone, and from a traced prefill that keeps everything."""
    loaded = LoadedModel.load(str(home / family), "auto", "cpu")
    row = whole[family].rows_of("none")[0]
    benchmark = load_benchmark(home / "clips.jsonl")
    item = next(i for i in benchmark.items() if i.id == row["item"])
    from tokprune.eval.sweep.evaluator import Batch
    from tokprune.trace.flops import prefill_macs, unpruned_macs

    inputs = Batch(loaded, benchmark, [item]).inputs
    with tokprune.compress(loaded.model, "random", keep=1.0) as trace, torch.inference_mode():
        loaded.model(**inputs, use_cache=True)
    assert trace.last is not None
    assert prefill_macs(trace.last).total == unpruned_macs(trace.last).total == row["macs"]
    assert sum(trace.last.kv_bytes()) == row["kv_bytes"]
    assert row["tokens_in"] == tiny.video_tokens_of(loaded.model, FRAMES)


def test_pooled_grids_have_their_own_scales(sweep: Any) -> None:
    run = run_sweep(sweep(methods=("pool", "m3"), keep=("1/9",), limit=3))
    for variant in ("pool", "m3"):
        trial = run.trials[f"{variant}@4"]
        assert (trial["status"], trial["options"]["keep"]) == ("ok", 1)
        assert {row["tokens_last"] for row in run.rows_of(f"{variant}@4")} == {FRAMES}


def test_budgets_of_frames_and_segments(sweep: Any) -> None:
    """``video_unit`` says what shares a budget's tokens; the sweep's budget is of the video."""
    methods = (
        "divprune:video_unit=frame",
        "grid:video_unit=2",
        "mustdrop:spatial=False",
        "evs:video_unit=2",
    )
    run = run_sweep(sweep(methods=methods, keep=(20, 12), limit=4))
    for name, trial in run.trials.items():
        if trial["method"] is None:
            continue
        if (
            trial["variant"] == "evs+video_unit=2" and trial["budget"] == 12
        ):  # two first frames are whole
            assert trial["status"] == "unreachable"
            continue
        assert trial["status"] == "ok", name
        assert abs(trial["calibrated"]["tokens_mean"] - trial["budget"]) <= 0.5, name
    options = run.trials["divprune+video_unit=frame@20"]["options"]
    assert (options["keep"], options["video_unit"]) == (5, "frame")
    assert "video_unit" not in run.trials["mustdrop+spatial=false@20"]["options"]


def test_variants_that_videos_cannot_have_are_said(sweep: Any) -> None:
    run = run_sweep(sweep(methods=("centerclip", "evs"), keep=(18,), limit=2, variants=True))
    trial = run.trials["centerclip+place=encoder@18"]
    assert trial["status"] == "unreachable"
    assert "place='encoder' clusters still images" in trial["reason"]
    others = {"centerclip", "centerclip+algorithm=spectral", "centerclip+aggregate=mean", "evs"}
    for variant in others:
        assert run.trials[f"{variant}@18"]["status"] == "ok", variant


def test_fewer_frames_are_a_control(whole: Any, home: Path) -> None:
    run = whole["llava_next_video"]
    half, other = run.trials["frames@18"], run.trials["frames@16"]
    assert half["options"] == other["options"] == {"frames": 2}
    assert (half["status"], half["reason"]) == ("ok", None)
    assert other["status"] == "unreachable"
    assert other["reason"] == "whole frames come to 18 tokens (frames=2), not to the 16 asked for"
    assert half["control"]
    assert half["method"] is None
    rows = run.rows_of("frames@18")
    assert {row["tokens_last"] for row in rows} == {18}
    assert all(row["macs"] < 0.6 * row["macs_unpruned"] for row in rows)  # half the frames encoded
    assert "frames@18" in run.latency["trials"]
    # the same answers as on a benchmark that has those frames only
    lines = [json.loads(line) for line in (home / "clips.jsonl").read_text().splitlines()]
    short = home / "short.jsonl"
    short.write_text("".join(
        json.dumps({**line, "frames": [line["frames"][1], line["frames"][3]]}) + "\n"
        for line in lines
    ))  # fmt: skip
    alone = run_sweep(case.settings(
        home / "llava_next_video", short, home / "alone", methods=("none",), limit=5,
        max_new_tokens=2,
    ))  # fmt: skip
    told = {row["item"]: row["answer"] for row in alone.rows_of("none")}
    assert {row["item"]: row["answer"] for row in rows} == told


def test_frames_are_taken_evenly() -> None:
    assert evenly_spaced(list(range(8)), 8) == list(range(8))
    assert evenly_spaced(list(range(8)), 4) == [1, 3, 5, 7]
    assert evenly_spaced(list(range(8)), 3) == [1, 4, 6]
    assert evenly_spaced(list(range(8)), 1) == [4]
    frames = [Image.new("RGB", (8, 8), (n, n, n)) for n in range(4)]
    small = ReducedInput(factor=2.0, frames=2)(frames)
    assert [(f.size, f.getpixel((0, 0))[0]) for f in small] == [((4, 4), 1), ((4, 4), 3)]
    assert ReducedInput()(frames) is frames
    for smaller in (ReducedInput(1.5), ReducedInput(frames=3)):
        assert ReducedInput.of(smaller.options) == smaller


# ----------------------------------------------------------------------------- one pass for all


@pytest.mark.parametrize("family", tiny.VIDEO_BUILDERS)
def test_one_pass_of_the_tower_serves_all_methods(sweep: Any, family: str) -> None:
    methods = ("divprune", "evs", "centerclip", "todre", "fastv:video_unit=frame")
    changes = {"model": family, "methods": methods, "keep": (12,)}
    shared = case.answers(run_sweep(sweep(out="shared", **changes)))
    alone = case.answers(run_sweep(sweep(out="alone", share=False, **changes)))
    assert shared == alone


@pytest.mark.parametrize("family", tiny.VIDEO_BUILDERS)
def test_the_same_bits_with_fewer_passes(family: str) -> None:
    model = tiny.VIDEO_BUILDERS[family]()
    inputs = tiny.make_inputs(model, [[4, "video", 6], [3, "video", 9]])
    chosen: list[tuple[str, dict[str, Any]]] = [
        ("divprune", {"keep": 9}), ("evs", {"keep": 12}),
        ("fastv", {"keep": 4, "video_unit": "frame"}),
    ]  # fmt: skip

    def logits(name: str | None, options: dict[str, Any]) -> torch.Tensor:
        with torch.inference_mode():
            if name is None:
                return model(**inputs).logits
            with tokprune.compress(model, name, **options):
                return model(**inputs).logits

    variants = [(None, {}), *chosen]
    alone = [logits(*variant) for variant in variants]
    with SharedEncoder(bind(model)) as shared:
        shared.remember(inputs["pixel_values_videos"])
        for variant, want in zip(variants, alone):
            assert torch.equal(logits(*variant), want), variant
        assert (shared.ran, shared.spared) == (1, len(chosen))
    assert not {"get_image_features", "get_video_features"} & set(model.model.__dict__)


# ----------------------------------------------------------------------------- what comes of it


def test_report_and_recommendation(whole: Any, home: Path, tmp_path: Path) -> None:
    run = whole["llava_next_video"]
    made = build_report(run.folder, tmp_path / "report", draws=100)
    page = made.html.read_text()
    assert "visual tokens per video" in page
    assert "3 videos" in page
    assert "36 in 6 layers" in page
    data = load_run(run.folder)
    assert (data.media, data.tokens) == ("video", TOKENS)
    records = [r for r in data.overlays if r["trial"].startswith("evs@")]
    assert records
    for record in records:
        assert (record["frames"], record["grid"]) == (FRAMES, [3, 3])
        placed = on_mosaic(record)
        assert placed["grid"] == [6, 6]
        for (row, col, frame), (y, x, tile) in zip(record["kept"], placed["kept"]):
            assert (y, x, tile) == (row + 3 * (frame // 2), col + 3 * (frame % 2), 0)
        # the first frame is kept whole: it stands clear, the top left of the mosaic
        assert [p for p in placed["kept"] if p[0] < 3 and p[1] < 3] == placed["kept"][:CELLS]
    images = re.findall(r'src="data:image/(?:png|jpeg);base64,([^"]+)"[^>]*alt="evs', page)
    assert images
    with Image.open(io.BytesIO(base64.b64decode(images[0]))) as drawn:
        assert drawn.size == (264, 264)
    found = recommend(run.folder, max_drop=0.99, same_questions=True, draws=50)
    method = load_setting(found.setting)
    assert method.name in tokprune.available_methods()


def test_a_part_of_the_mosaic_is_empty_where_frames_end() -> None:
    record = {"frames": 5, "grid": [2, 3], "kept": [[1, 2, 4]], "sources": [[[1, 2, 4], [0, 0, 0]]]}
    placed = on_mosaic(record)
    assert placed["grid"] == [4, 9]
    assert placed["kept"] == [[3, 5, 0]]
    assert placed["sources"] == [[[3, 5, 0], [0, 0, 0]]]
    still = {"kept": [[0, 0, 1]]}
    assert on_mosaic(still) is still


@pytest.mark.slow
def test_the_embedded_clips_in_a_sweep(sweep: Any) -> None:
    run = run_sweep(sweep(
        benchmark="mini-video", methods=("evs", "centerclip"), keep=("1/4",), limit=10,
        controls=True, calibrate=5,
    ))  # fmt: skip
    assert run.info["benchmark"]["tasks"] == list(load_benchmark("mini-video").tasks)
    assert len(run.rows_of("none")) == 10
    for variant in ("evs", "centerclip", "frames", "random"):
        assert run.trials[f"{variant}@18"]["status"] == "ok", variant
        assert {row["tokens_last"] for row in run.rows_of(f"{variant}@18")} == {18.0}, variant


# ----------------------------------------------------------------------------- refusals


def test_what_does_not_fit_is_refused_before_anything_runs(sweep: Any, home: Path) -> None:
    with pytest.raises(ValueError, match=r"asks about videos, and model .* takes images only"):
        run_sweep(sweep(model="images"))
    stills = home / "stills" / "small.jsonl"
    if isinstance(LoadedModel.load(str(home / "llava_onevision")).processor, FramesProcessor):
        with pytest.raises(ValueError, match=r"asks about images, which model .* torchvision"):
            run_sweep(sweep(model="llava_onevision", benchmark=stills))
    with pytest.raises(ValueError, match="'frames' is a control of videos"):
        run_sweep(sweep(model="images", benchmark=stills, methods=("frames",)))
    with pytest.raises(ValueError, match="keep=37 is more than the 36 visual tokens"):
        run_sweep(sweep(keep=(37,)))


def _lines(home: Path, *changes: dict[str, Any]) -> Path:
    plain = [json.loads(line) for line in (home / "clips.jsonl").read_text().splitlines()]
    made = [{**line, **change} for line, change in zip(plain, changes)]
    path = home / "changed.jsonl"
    path.write_text("".join(
        json.dumps({k: v for k, v in line.items() if v is not None}) + "\n" for line in made
    ))  # fmt: skip
    return path


def test_files_of_videos(home: Path) -> None:
    benchmark = load_benchmark(home / "clips.jsonl")
    assert benchmark.media == "video"
    items = benchmark.items()
    frames = benchmark.video(items[0])
    assert [frame.size for frame in frames] == [(48, 48)] * FRAMES
    assert frames[0].tobytes() != frames[1].tobytes()
    assert items[0].image_id == items[3].image_id != items[1].image_id
    with pytest.raises(ValueError, match="asks about videos, and item 'v0' has no image"):
        benchmark.image(items[0])
    stills = load_benchmark(home / "stills" / "small.jsonl")
    with pytest.raises(ValueError, match="asks about images, and item 'q0' has no video"):
        stills.video(stills.items()[0])
    # the frames are part of the version
    other = load_benchmark(_lines(home, *[{"frames": [f"{i % 3}-0.png"] * 4} for i in range(6)]))
    same = load_benchmark(_lines(home, *[{}] * 6))
    assert other.version != same.version == benchmark.version


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": []}, r"line 2: field 'frames' should be a list of images, is \[\]"),
        ({"frames": "0-0.png"}, r"line 2: field 'frames' should be a list of images, is '0-0"),
        ({"frames": ["0-0.png"] * 3}, "line 2: field 'frames' has 3 frames, and the first line 4"),
        ({"frames": ["0-0.png", None] * 2}, r"line 2: field 'frames\[1\]' should be the path"),
        ({"frames": ["0-9.png"] * 4}, r"line 2: field 'frames\[0\]': 0-9.png: no such file"),
        ({"image": "0-0.png"}, "line 2: field 'image' or 'frames' should be given, both are"),
        ({"frames": None, "image": "0-0.png"}, "line 2: field 'image': the lines before have 'fra"),
    ],
)  # fmt: skip
def test_bad_files_of_videos(home: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        load_benchmark(_lines(home, {}, change))


def test_parquet_of_videos(home: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    raw = [(home / f"0-{n}.png").read_bytes() for n in range(FRAMES)]
    table = pyarrow.table({
        "id": ["a", "b"], "question": ["what ?", "how ?"], "answer": ["lake", "sun"],
        "frames": [[{"bytes": data, "path": None} for data in raw]] * 2,
    })  # fmt: skip
    parquet.write_table(table, home / "clips.parquet")
    benchmark = load_benchmark(home / "clips.parquet")
    frames = benchmark.video(benchmark.items()[1])
    with Image.open(home / "0-2.png") as third:
        assert frames[2].tobytes() == third.convert("RGB").tobytes()
