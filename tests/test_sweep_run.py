"""Sweeps on tiny models: what is asked, recorded, shared, resumed and refused."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sweep_case as case
import torch

import tokprune
from tokprune.eval.benchmarks import load_benchmark
from tokprune.eval.benchmarks.files import FileBenchmark
from tokprune.eval.sweep import Settings, read_run, run_sweep
from tokprune.eval.sweep import evaluator as evaluator_module
from tokprune.eval.sweep.evaluator import Evaluator
from tokprune.eval.sweep.loaded_model import LoadedModel
from tokprune.eval.sweep.progress import Lines
from tokprune.eval.sweep.reduced_input import downsample
from tokprune.eval.sweep.store import Store
from tokprune.methods import OccamToken

pytestmark = pytest.mark.usefixtures("load_once")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models with six decoder layers, a tiled one, and a benchmark of seven questions."""
    root = tmp_path_factory.mktemp("sweep")
    case.make_model(root / "model", layers=6)
    case.make_model(root / "other", layers=6, seed=1)
    case.make_model(root / "tiled", "llava_next", layers=6)
    case.make_benchmark(root / "bench")
    return root


@pytest.fixture
def sweep(home: Path, tmp_path: Path) -> Callable[..., Settings]:
    def make(**changes: Any) -> Settings:
        model = home / changes.pop("model", "model")
        benchmark = changes.pop("benchmark", home / "bench" / "small.jsonl")
        return case.settings(model, benchmark, tmp_path / changes.pop("out", "run"), **changes)

    return make


def model_of(settings: Settings) -> Any:
    # loaded once for the same arguments
    return LoadedModel.load(
        settings.model, settings.dtype, settings.device, settings.trust_remote_code
    ).model


def unpatched(model: Any) -> bool:
    hooks = [
        hook
        for module in model.modules()  # transformers has hooks of its own
        for hook in [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if "tokprune" in getattr(hook, "__module__", "") + repr(hook)
    ]
    clean = "get_image_features" not in model.model.__dict__
    return clean and not hooks and not tokprune.is_patched(model)


# ----------------------------------------------------------------------------- contents


@pytest.fixture(scope="module")
def whole(home: Path, tmp_path_factory: pytest.TempPathFactory, loaded_once: Any) -> Any:
    """Every method and control at three budgets, with noise floor, timing and overlays."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoadedModel, "load", loaded_once)
        settings = case.settings(
            home / "model", home / "bench" / "small.jsonl", tmp_path_factory.mktemp("out") / "run",
            methods=(), keep=("1/2", 9), controls=True, noise=True, latency=True,
            latency_rounds=2, seeds=(0, 1), batch_size=4, limit=5, max_new_tokens=2,
        )  # fmt: skip
        run = run_sweep(settings, command=["tokprune", "sweep", "--out", "a b"])
        assert unpatched(model_of(settings))
        return run


def test_every_trial_has_every_question_once(whole: Any) -> None:
    info = whole.info
    assert info["finished"]
    assert info["command"] == "tokprune sweep --out 'a b'"
    assert (info["benchmark"]["items"], info["model"]["visual_tokens"]) == (5, 36)
    assert (
        info["benchmark"]["tasks"] == info["benchmark"]["headline"] == ["count", "place", "thing"]
    )
    variants = {trial["variant"] for trial in whole.trials.values()}
    assert variants == {*tokprune.methods.image_methods(), "none", "blind", "downsample"}
    for name, trial in whole.trials.items():
        rows = whole.rows_of(name)
        assert len(rows) == (5 if trial["status"] == "ok" else 0), name
        assert {row["status"] for row in rows} <= {"ok"}
    assert (whole.stale, whole.duplicates) == (0, 0)
    noise = [name for name, trial in whole.trials.items() if trial["noise"]]
    assert noise == ["none.batch1", "none.bfloat16"]
    assert whole.trials["none.batch1"]["batch_size"] == 1
    assert whole.trials["none.bfloat16"]["dtype"] == "bfloat16"
    assert [row["trial"] for row in whole.rows[:10]] == noise[:1] * 5 + noise[1:] * 5  # first
    assert {n for n in whole.trials if n.endswith(".s1")} == {"random@18.s1", "random@9.s1"}


def test_budgets_are_matched_on_measured_means(whole: Any) -> None:
    reached = set()
    for name, trial in whole.trials.items():
        if trial["variant"] in ("none", "blind", "downsample"):
            continue
        told = trial["calibrated"]["tokens_mean"]
        off = abs(told - trial["budget"])
        if trial["status"] == "unreachable":
            assert off > 0.5
            assert f"{told:.4g} visual tokens per decoder layer" in trial["reason"]
            continue
        reached.add(trial["variant"])
        assert off <= 0.5, name
        rows = whole.rows_of(name)
        measured = sum(row["tokens_mean"] for row in rows) / len(rows)
        assert abs(measured - trial["budget"]) <= 1, name  # all items, not those of the matching
        assert all(row["tokens_in"] == 36 and row["tokens_last"] <= 36 for row in rows)
    # how many patches pass OccamToken's first stage is another option's business
    assert reached == set(tokprune.methods.image_methods()) - {"occamtoken"}
    # one of six layers sees all 36 tokens: (36 + 5 · 14) / 6
    told = whole.trials["fastv@18"]["calibrated"]
    assert told == {"tokens_last": 14.0, "tokens_mean": pytest.approx(106 / 6, abs=1e-3)}
    # keep=1 drops 1/7 and 3/7 of 35 before layers 1 and 2: (36 + 31 + 21 + 3 · 1) / 6
    transprune = whole.trials["transprune@9"]
    assert transprune["status"] == "unreachable"
    assert transprune["calibrated"]["tokens_mean"] == pytest.approx(91 / 6, abs=1e-3)


def test_numbers_of_a_row_are_those_of_the_question_alone(whole: Any, home: Path) -> None:
    loaded = LoadedModel.load(str(home / "model"), "auto", "cpu")
    benchmark = load_benchmark(home / "bench" / "small.jsonl")
    for name in ("fastv@18", "flowcut@9", "mustdrop@18", "none"):
        trial = whole.trials[name]
        for row, item in zip(sorted(whole.rows_of(name), key=lambda r: r["item"])[:3],
                             benchmark.items()):  # fmt: skip
            assert row["item"] == item.id
            batch = evaluator_module.Batch(loaded, benchmark, [item])
            method = trial["method"] or "random"
            options = trial["options"] or {"keep": 1.0}
            with tokprune.compress(loaded.model, method, **_tuples(options)) as trace:
                with torch.inference_mode():
                    loaded.model.generate(**batch.inputs, max_new_tokens=2)
                told = trace.to_dict()
            assert row["macs"] == told["macs"]["total"]
            assert row["macs_unpruned"] == told["macs_unpruned"]["total"]
            assert row["kv_bytes"] == told["kv_bytes"]
            assert row["kv_bytes_unpruned"] == told["kv_bytes_unpruned"]
            assert row["tokens_mean"] == pytest.approx(told["mean_visual_tokens"], abs=1e-3)
            assert row["prompt_tokens"] == int(batch.inputs["attention_mask"].sum())


def _tuples(options: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}


def test_downsampling_shows_less_and_saves_nothing_in_a_fixed_tower(whole: Any) -> None:
    rows = {r["item"]: r for r in whole.rows_of("none")}
    small = whole.rows_of("downsample@9")
    assert whole.trials["downsample@9"]["options"] == {"factor": 2.0}
    assert all(r["tokens_mean"] == 36 and r["macs"] == r["macs_unpruned"] for r in small)
    assert any(r["answer"] != rows[r["item"]]["answer"] for r in small)


def test_overlays_and_timing(whole: Any) -> None:
    records = whole.overlays()
    budget = {whole.trials[r["trial"]]["budget"] for r in records}
    assert budget == {9}  # nearest to 11 % of 36
    assert {r["item"] for r in records} == {"q0", "q1", "q2"}  # the first of each task
    by_trial = {r["trial"]: r for r in records if r["item"] == "q0"}
    assert len(by_trial["grid@9"]["kept"]) == 9
    assert not by_trial["grid@9"]["merged"]
    assert by_trial["pool@9"]["merged"]
    assert sum(map(len, by_trial["pool@9"]["sources"])) == 36
    assert whole.latency is not None
    timed = {n for n, c in whole.trials.items() if c["status"] == "ok" and not c["noise"]}
    assert set(whole.latency["trials"]) == {
        n for n in timed if not n.startswith(("downsample", "blind"))
    }
    assert whole.latency["trials"]["none"]["selection"] is None
    assert whole.latency["trials"]["grid@9"]["total"]["n"] == 2


# ------------------------------------------------------------------------------ sharing


@pytest.mark.parametrize("model", ["model", "tiled"])
def test_sharing_the_encoder_changes_nothing(sweep: Any, model: str) -> None:
    few = {
        "methods": ("todre", "fastv", "flowcut", "pool", "visionzip"), "keep": ("1/4", "1/2"),
        "model": model, "limit": 4, "batch_size": 2,
    }  # fmt: skip
    shared = run_sweep(sweep(**few, out="shared"))
    alone = run_sweep(sweep(**few, out="alone", share=False))
    assert case.answers(shared) == case.answers(alone)
    assert len({row["answer"] for row in shared.rows}) > 4
    ran = {shared.trials[row["trial"]]["variant"] for row in shared.rows}
    assert ran >= {"none", "todre", "fastv", "flowcut"}  # by tap, by features, by own encoder pass


def test_the_encoder_runs_once_for_trials_that_leave_it_alone(
    sweep: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = sweep(methods=("divprune", "fastv", "todre", "flowcut"), keep=(18,), limit=3)
    tower = model_of(settings).model.vision_tower
    passes: list[int] = []

    def count(share: bool, out: str) -> int:
        passes.clear()
        handle = tower.register_forward_hook(lambda *call: passes.append(1))
        try:
            run_sweep(sweep(methods=settings.methods, keep=(18,), limit=3, share=share, out=out))
        finally:
            handle.remove()
        return len(passes)

    # matching: 4 methods, one prefill each (divprune, todre and flowcut hit at once; fastv needs
    # 2 more); answering: none and 4 methods
    alone, shared = count(False, "alone"), count(True, "shared")
    assert shared == 3 + 3  # none's features, todre's tap, flowcut's own pass; twice
    assert alone >= 4 + 5


# ------------------------------------------------------------------------------- resume


def test_a_sweep_run_twice_gives_identical_answers(sweep: Any) -> None:
    first, second = (
        run_sweep(sweep(out=out, methods=("random", "todre"), seeds=(0, 3))) for out in "ab"
    )
    assert case.answers(first) == case.answers(second)


def test_nothing_is_asked_twice(sweep: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run_sweep(sweep())
    before = (done.folder / "rows.jsonl").read_bytes()

    def never(*_: Any) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr(Evaluator, "evaluate", never)
    again = run_sweep(sweep())
    assert (done.folder / "rows.jsonl").read_bytes() == before
    assert again.info["finished"]
    assert again.info["created"] == done.info["created"]


def test_methods_budgets_and_seeds_may_be_added(sweep: Any) -> None:
    first = run_sweep(sweep(methods=("fastv",), keep=(18,)))
    grown = run_sweep(sweep(methods=("random",), keep=(9,), seeds=(0, 1)))
    assert list(grown.trials) == ["none", "fastv@18", "random@9", "random@9.s1"]
    assert grown.rows[: len(first.rows)] == first.rows
    assert grown.info["settings"]["methods"] == ["none", "fastv", "random"]
    assert grown.info["settings"]["keep"] == ["18", "9"]
    fresh = run_sweep(sweep(methods=("random",), keep=(9,), fresh=True))
    assert list(fresh.trials) == ["none", "random@9"]


def test_a_changed_option_never_reuses_a_row(sweep: Any) -> None:
    first = run_sweep(sweep(methods=("todre",), keep=(9,)))
    second = run_sweep(sweep(methods=("todre:select=k_center",), keep=(9,)))
    assert list(second.trials) == ["none", "todre@9", "todre+select=k_center@9"]
    assert len(second.rows) == len(first.rows) + 7
    info = json.loads((second.folder / "run.json").read_text())
    info["trials"][1]["options"]["tau"] = 0.2  # as if the same trial had been made otherwise
    (second.folder / "run.json").write_text(json.dumps(info))
    assert read_run(second.folder).stale == 7


def test_changed_code_asks_again(sweep: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run_sweep(sweep(methods=("fastv",), keep=(18,)))
    monkeypatch.setattr("tokprune.eval.sweep.runner.code_hash", lambda runtime: "new")
    second = run_sweep(sweep(methods=("fastv",), keep=(18,)))
    assert second.stale == len(first.rows) == len(second.rows)
    assert {r["row"] for r in first.rows}.isdisjoint(r["row"] for r in second.rows)


@pytest.mark.parametrize("kept", [1, 5])
def test_a_torn_batch_is_completed_as_it_would_have_been(sweep: Any, kept: int) -> None:
    whole = run_sweep(sweep(out="whole"))
    torn = run_sweep(sweep())
    lines = (torn.folder / "rows.jsonl").read_bytes().splitlines(keepends=True)
    (torn.folder / "rows.jsonl").write_bytes(b"".join(lines[:kept]) + lines[kept][:40])
    with pytest.warns(UserWarning, match="removed and its question asked again"):
        resumed = run_sweep(sweep())
    assert case.answers(resumed) == case.answers(whole)
    assert len((torn.folder / "rows.jsonl").read_bytes().splitlines()) == len(lines)


@pytest.mark.parametrize("stop_at", [0, 4])
def test_interruption_leaves_a_valid_folder_and_a_clean_model(
    sweep: Any, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    asked: list[int] = []
    real = evaluator_module.generate_answers

    def interrupted(*args: Any) -> Any:
        asked.append(1)
        if len(asked) > stop_at:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(evaluator_module, "generate_answers", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_sweep(sweep())
    assert unpatched(model_of(sweep()))
    part = read_run(sweep().out)
    assert not part.info["finished"]
    assert len(part.rows) == 3 * stop_at
    resumed = run_sweep(sweep())
    assert resumed.info["finished"]
    assert case.answers(resumed) == case.answers(run_sweep(sweep(out="whole")))


def test_full_disk_ends_the_sweep_and_the_next_one_goes_on(
    sweep: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, writes = Store.append, []

    def full(store: Store, rows: Any) -> None:
        writes.append(1)
        if len(writes) == 3:
            raise OSError("rows.jsonl: no space left on device")
        real(store, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "append", full)
        with pytest.raises(OSError, match="no space left"):
            run_sweep(sweep())
    assert unpatched(model_of(sweep()))
    assert len(read_run(sweep().out).rows) == 6
    assert case.answers(run_sweep(sweep())) == case.answers(run_sweep(sweep(out="whole")))


# ----------------------------------------------------------------------------- failures


def test_failed_questions_fail_alone_and_count_as_wrong(
    sweep: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = run_sweep(sweep(out="plain"))
    real = evaluator_module.generate_answers

    def fragile(loaded: Any, inputs: Any, longest: int) -> Any:
        lengths = inputs["attention_mask"].sum(1)
        if (lengths == lengths_of_q1).any():
            raise RuntimeError("cannot\n  do this one")
        return real(loaded, inputs, longest)

    lengths = {r["item"]: r["prompt_tokens"] for r in plain.rows}
    lengths_of_q1 = lengths["q1"]
    same = {item for item, length in lengths.items() if length == lengths_of_q1}
    assert len(same) < len(lengths)
    monkeypatch.setattr(evaluator_module, "generate_answers", fragile)
    told: list[str] = []
    progress = Lines()
    monkeypatch.setattr(progress, "say", told.append)
    run = run_sweep(sweep(), progress=progress)
    failed = [r for r in run.rows if r["status"] == "failed"]
    assert {r["item"] for r in failed} == same
    assert len(run.rows) == len(plain.rows)
    for r in failed:
        assert (r["score"], r["answer"], r["error"]) == (
            0.0,
            "",
            "RuntimeError: cannot do this one",
        )
        assert (r["tokens_in"], r["tokens_mean"], r["new_tokens"]) == (36, None, 0)
    assert run.info["finished"]
    assert unpatched(model_of(sweep()))
    assert any("failed; they count as incorrect" in line for line in told)


def test_unreadable_images_fail_alone(sweep: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = FileBenchmark.image

    def broken(benchmark: FileBenchmark, item: Any) -> Any:
        if item.id in ("q0", "q4"):
            raise OSError("truncated image")
        return real(benchmark, item)

    monkeypatch.setattr(FileBenchmark, "image", broken)
    run = run_sweep(sweep(methods=("fastv",)))
    failed = {r["item"]: r for r in run.rows if r["status"] == "failed"}
    assert set(failed) == {"q0", "q4"}
    assert failed["q0"]["error"] == "OSError: truncated image"
    assert failed["q0"]["tokens_in"] is None
    assert len(run.rows) == 7 * len([c for c in run.trials.values() if c["status"] == "ok"])


def test_no_room_for_the_noise_dtype_is_recorded(
    sweep: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = LoadedModel.load

    def small(name: str, dtype: str = "auto", *more: Any) -> Any:
        if dtype == "bfloat16":
            raise RuntimeError("out of memory")
        return real(name, dtype, *more)

    monkeypatch.setattr(LoadedModel, "load", small)
    run = run_sweep(sweep(methods=("fastv",), keep=(18,), noise=True, limit=3))
    trial = run.trials["none.bfloat16"]
    assert (trial["status"], run.rows_of("none.bfloat16")) == ("unreachable", [])
    assert "out of memory" in trial["reason"]
    assert run.info["finished"]


# -------------------------------------------------------------------------- bad folders


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({}, {"model": "other"}, r"belongs to another model: .*model \(hash"),
        ({}, {"dtype": "bfloat16"}, r"belongs to another model: .*dtype float32.*dtype bfloat16"),
        ({}, {"limit": 3}, "was made with limit=None, this sweep has 3"),
        ({}, {"tasks": ("count",)}, "was made with tasks=None"),
        ({}, {"match": "last"}, "was made with match='mean', this sweep has 'last'"),
        ({}, {"batch_size": 2}, "was made with batch_size=3, this sweep has 2"),
    ],
)
def test_folders_of_other_sweeps_are_refused(
    sweep: Any, monkeypatch: pytest.MonkeyPatch, first: Any, second: Any, message: str
) -> None:
    done = run_sweep(sweep(methods=("fastv",), keep=(18,), **first))
    before = (done.folder / "run.json").read_bytes(), (done.folder / "rows.jsonl").read_bytes()
    monkeypatch.setattr(Evaluator, "evaluate", None)
    with pytest.raises(ValueError, match=message):
        run_sweep(sweep(methods=("fastv",), keep=(18,), **second))
    assert before == (
        (done.folder / "run.json").read_bytes(), (done.folder / "rows.jsonl").read_bytes(),
    )  # fmt: skip


def test_another_version_of_the_benchmark_is_refused(sweep: Any, tmp_path: Path) -> None:
    path = case.make_benchmark(tmp_path / "bench", 3)
    run_sweep(sweep(methods=("fastv",), keep=(18,), benchmark=path))
    case.make_benchmark(tmp_path / "bench", 4)
    with pytest.raises(ValueError, match=r"belongs to another benchmark: small \(version"):
        run_sweep(sweep(methods=("fastv",), keep=(18,), benchmark=path))


def test_rows_without_run_json_are_refused(sweep: Any) -> None:
    done = run_sweep(sweep(methods=("fastv",), keep=(18,)))
    (done.folder / "run.json").unlink()
    with pytest.raises(ValueError, match=r"14 rows but no run.json"):
        run_sweep(sweep(methods=("fastv",), keep=(18,)))


# ----------------------------------------------------------------------------- variants


def test_matching_the_last_layer_instead(sweep: Any) -> None:
    run = run_sweep(sweep(methods=("fastv", "transprune"), keep=(9,), match="last", limit=3))
    assert run.trials["fastv@9"]["calibrated"] == {"tokens_last": 9.0, "tokens_mean": 13.5}
    assert run.trials["transprune@9"]["calibrated"]["tokens_last"] == 9.0
    assert {row["tokens_last"] for row in run.rows_of("fastv@9")} == {9.0}


def test_tiled_models_match_counts_and_shares(sweep: Any) -> None:
    run = run_sweep(
        sweep(
            model="tiled", methods=("divprune", "fastv"), keep=("1/2", 40), controls=True, limit=4
        )
    )
    (none,) = [c for c in run.trials.values() if c["variant"] == "none"]
    sizes = [row["tokens_in"] for row in run.rows_of("none")]
    assert len(set(sizes)) > 1  # images of different shape
    assert none["budget"] == pytest.approx(sum(sizes) / len(sizes))
    for name, trial in run.trials.items():
        if trial["variant"] in ("divprune", "random", "grid"):
            rows = run.rows_of(name)
            mean = sum(row["tokens_mean"] for row in rows) / len(rows)
            assert abs(mean - trial["budget"]) <= max(0.5, 0.01 * trial["budget"]), name


def test_timing_is_in_proportion_to_the_answers(
    sweep: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few questions: one round. Many, that is, answers that took long: five."""
    from tokprune.eval.sweep import runner

    for seconds, rounds in ((0.0, 1), (1e9, 5)):
        monkeypatch.setattr(runner, "_seconds", lambda rows, seconds=seconds: seconds)
        run = run_sweep(sweep(methods=("random",), keep=(9,), limit=2, latency=True, fresh=True))
        times = run.latency["trials"]
        assert {part["n"] for parts in times.values() for part in parts.values() if part} == {
            rounds
        }


def test_smaller_images_are_matched_on_their_measured_tokens(sweep: Any) -> None:
    run = run_sweep(
        sweep(
            model="tiled", methods=("downsample",), keep=("3/4", "1/2", 9), limit=6, calibrate=6,
            latency=True, latency_rounds=2,
        )
    )  # fmt: skip
    full = run.trials["none"]["budget"]
    matched, timed = 0, {"none"}
    for name, trial in run.trials.items():
        if trial["variant"] != "downsample":
            continue
        rows = run.rows_of(name)
        mean = sum(row["tokens_mean"] for row in rows) / len(rows)
        assert trial["calibrated"]["tokens_mean"] == pytest.approx(mean, abs=1e-2)
        nominal = (full / trial["budget"]) ** 0.5
        if trial["reason"] is None:
            matched += 1
            assert 0.9 * trial["budget"] <= mean <= 1.01 * trial["budget"] + 0.5
        else:
            assert trial["options"]["factor"] == pytest.approx(nominal, rel=1e-4)
            assert "pixels are matched" in trial["reason"]
        if mean < full:
            timed.add(name)
            assert sum(r["macs"] for r in rows) < sum(r["macs_unpruned"] for r in rows)
    assert matched
    assert run.trials["downsample@9"]["reason"] is not None  # one tile alone has 36
    assert run.latency is not None
    assert set(run.latency["trials"]) == timed


def test_images_never_shrink_to_nothing() -> None:
    from PIL import Image

    assert downsample(Image.new("RGB", (40, 30)), 2.5).size == (16, 12)
    tiny = downsample(Image.new("RGB", (40, 2), (9, 8, 7)), 10)
    assert tiny.size == (16, 4)  # 4 × 1 pixels, each four times as wide and high
    assert tiny.getpixel((3, 3)) == (9, 8, 7)


def test_lines_say_nothing_of_a_speed_before_the_first_step() -> None:
    """A warm-up that takes long advances by nothing."""
    file = io.StringIO()
    lines = Lines(file, every=0)
    lines.start("timing", 2)
    lines.advance(0)
    assert file.getvalue() == ""
    lines.advance(1)
    lines.advance(1)
    assert [line.split(",")[0] for line in file.getvalue().splitlines()] == [
        "timing: 1/2",
        "timing: 2/2",
    ]


def test_an_adaptive_method_meets_a_mean_by_its_own_knob(sweep: Any) -> None:
    """Images then keep as many as they like, and the sweep meets the budget on the mean."""
    spec = {"occamtoken": {"lambda2": 0.0, "turn": "lambda1"}}
    run = run_sweep(sweep(methods=(spec,), keep=("1/2",), limit=6, max_new_tokens=1))
    (trial,) = [own for own in run.trials.values() if own["method"] == "occamtoken"]
    assert trial["options"]["keep"] is None
    assert trial["options"]["lambda1"] != OccamToken().lambda1
    rows = run.rows_of(trial["trial"])
    assert len(rows) == 6 * (trial["status"] == "ok")
    assert abs(trial["calibrated"]["tokens_mean"] - 18) < 3
    assert len({row["tokens_mean"] for row in rows}) > 1


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"occamtoken": {"turn": "keeps"}}, "'turn' of occamtoken should be one of 'lambda2'"),
        ({"fastv": {"turn": "rows"}}, "option 'turn' of fastv should be one of 'keep', is 'rows'"),
    ],
)  # fmt: skip
def test_a_knob_that_is_none_is_named(sweep: Any, spec: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        run_sweep(sweep(methods=(spec,), keep=("1/2",)))
