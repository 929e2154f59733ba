"""`tokprune run` and `tokprune.load` on newer families: images, several images, folders of frames,
films, limits of pixels. Model folders are made in code, with processors that are transformers' own
(and without torchvision a video processor of ours)."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import family_processors
import pytest
import tiny_processor
import torch
from PIL import Image

import tokprune
from tokprune.cli import app
from tokprune.inputs.clips import Clip
from tokprune.inputs.films import read_film
from tokprune.inputs.frame_videos import PatchedVideos, fitted
from tokprune.inputs.pixel_limits import limit_pixels
from tokprune.inputs.prompts import add_token_types, encode, model_inputs, prompt_text

HAS_AV = importlib.util.find_spec("av") is not None
films = pytest.mark.skipif(not HAS_AV, reason="PyAV is not installed (extra 'film')")
PROMPT = "what is in the picture ?"
FRAMES = 6


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(values.numpy())


def make_film(path: Path, frames: int = 12, fps: int = 4) -> Path:
    """A film whose frame n is of grey level 20 · n."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4" if path.suffix == ".mp4" else "ffv1", rate=fps)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for number in range(frames):
            image = Image.new("RGB", (48, 32), (20 * number,) * 3)
            for packet in stream.encode(av.VideoFrame.from_image(image)):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder per family, pictures, a folder of frames, and a film."""
    root = tmp_path_factory.mktemp("families")
    for family in family_processors.FAMILIES:
        family_processors.save(root / family, family)
    picture(48, 40).save(root / "a.png")
    picture(24, 56, 1).save(root / "b.png")
    (root / "clip").mkdir()
    for number in range(FRAMES):
        picture(40, 24, number).save(root / "clip" / f"f{number}.png")
    if HAS_AV:
        make_film(root / "film.mp4")
    return root


@pytest.fixture
def run(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, dict[str, Any], str]]:
    """Runs the command in this process: exit code, its JSON, its error text."""

    def call(family: str, *args: Any) -> tuple[int, dict[str, Any], str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            app([
                "run", "--model", str(home / family), "--prompt", PROMPT, "--max-new-tokens", "3",
                "--device", "cpu", "--json", *map(str, args),
            ])  # fmt: skip
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), json.loads(out) if out else {}, err

    return call


def shown(home: Path, kind: str) -> list[Any]:
    return {
        "image": ["--image", home / "a.png"],
        "images": ["--image", home / "a.png", "--image", home / "b.png"],
        "frames": ["--video", home / "clip", "--frames", 4],
        "film": ["--video", home / "film.mp4", "--frames", 4],
    }[kind]


CASES = [
    pytest.param(family, kind, marks=films if kind == "film" else ())
    for family in family_processors.FAMILIES
    for kind in ("image", "images", "frames", "film")
    if family in family_processors.WITH_VIDEOS or kind.startswith("image")
]


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_run_prunes_what_is_shown(run: Any, home: Path, family: str, kind: str) -> None:
    code, told, err = run(
        family, *shown(home, kind), "--method", "divprune", "--keep", 0.5, "--compare"
    )
    assert code == 0, err
    trace = told["trace"]
    # to a model without videos of its own every frame is an image
    images = {"image": 1, "images": 2}.get(kind, 4 if family == "internvl" else 1)
    assert len(trace["images"]) == images
    kept = [image["stages"][0]["count"] for image in trace["images"]]
    assert kept == [round(image["tokens_in"] / 2) for image in trace["images"]]
    assert {"answer", "answer_unpruned"} <= set(told)


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("qwen2.5-vl", "images"),
        pytest.param("qwen3-vl", "film", marks=films),
        ("gemma3", "image"),
        ("internvl", "frames"),
    ],
)
def test_the_installed_command(home: Path, family: str, kind: str) -> None:
    done = subprocess.run(
        [
            Path(sys.executable).with_name("tokprune"), "run", "--model", home / family,
            "--prompt", PROMPT, "--max-new-tokens", "3", "--device", "cpu", "--method", "fastv",
            "--keep", "0.5", *map(str, shown(home, kind)),
        ],
        capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "FastV(keep=0.5" in done.stdout


@pytest.mark.parametrize("family", ["qwen2.5-vl", "gemma3"])
def test_the_answer_is_the_one_by_hand(run: Any, home: Path, family: str) -> None:
    code, told, err = run(family, *shown(home, "images"))
    assert code == 0, err
    model, processor = tokprune.load(home / family, processor=True)
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "image"},
                                      {"type": "text", "text": PROMPT}]}],
        add_generation_prompt=True,
    )  # fmt: skip
    images = [Image.open(home / name).convert("RGB") for name in ("a.png", "b.png")]
    inputs = processor(
        images=[images] if family == "gemma3" else images, text=[text], return_tensors="pt",
        add_special_tokens=False,
    )  # fmt: skip
    with torch.inference_mode():
        tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    new = tokens[0, inputs["input_ids"].shape[1] :]
    assert told["answer"] == processor.decode(new, skip_special_tokens=True).strip()


def test_overlays_of_images_and_frames(run: Any, home: Path, tmp_path: Path) -> None:
    for family, kind in (("qwen2.5-vl", "frames"), ("gemma3", "images"), ("internvl", "frames")):
        path = tmp_path / f"{family}.png"
        code, _, err = run(
            family, *shown(home, kind), "--method", "grid", "--keep", 0.5, "--overlay", path
        )
        assert code == 0, err
        with Image.open(path) as saved:
            assert saved.width > 400


# ------------------------------------------------------------------------------ prompts


def test_places_in_the_prompt_are_used(home: Path) -> None:
    _, processor = tokprune.load(home / "qwen2.5-vl", processor=True)
    place = "<|vision_start|><|image_pad|><|vision_end|>"
    front = f"user : {place}{place}what is it ? assistant :"
    assert prompt_text(processor, "what is it ?", 2) == front
    for word in ("<image>", "<|image_pad|>", place):
        between = prompt_text(processor, f"is {word} or {word} a lake ?", 2)
        assert between == f"user : is {place} or {place} a lake ? assistant :"
    both = prompt_text(processor, "<video> and <image> ?", 1, 1)
    assert both.index("video_pad") < both.index("image_pad")
    with pytest.raises(ValueError, match=r"has 1 place\(s\) for images, and there are 2"):
        prompt_text(processor, "is <image> a lake ?", 2)
    with pytest.raises(ValueError, match=r"has 0 place\(s\) for videos, and there are 1"):
        prompt_text(processor, "is <image> a lake ?", 1, 1)


def test_prompts_without_a_template() -> None:
    class PaliGemmaProcessor:
        chat_template, image_token, video_token = None, "<image>", None

    class PixtralProcessor(PaliGemmaProcessor):
        image_token = "[IMG]"

    class OtherProcessor(PaliGemmaProcessor):
        pass

    assert (
        prompt_text(PaliGemmaProcessor(), "answer en what ?", 2) == "<image><image>answer en what ?"
    )
    assert prompt_text(PixtralProcessor(), "what ?") == "<s>[INST][IMG]what ?[/INST]"
    assert prompt_text(OtherProcessor(), "what ?") == "USER: <image>\nwhat ? ASSISTANT:"
    assert prompt_text(OtherProcessor(), "what ?", 0) == "USER: what ? ASSISTANT:"
    assert prompt_text(OtherProcessor(), "<image>\nwhat ?") == "USER: <image>\nwhat ? ASSISTANT:"
    assert prompt_text(OtherProcessor(), "is <image> a lake ?") == (
        "USER: is <image> a lake ? ASSISTANT:"
    )


def test_one_begin_token(home: Path) -> None:
    model, processor = tokprune.load(home / "gemma3", processor=True)
    text = prompt_text(processor, PROMPT)
    assert text.startswith("<s>")
    ids = model_inputs(processor, [text], [[picture(40, 40)]], model=model)["input_ids"]
    assert (ids == processor.tokenizer.bos_token_id).sum() == 1


@pytest.mark.parametrize("family", family_processors.FAMILIES)
def test_token_types_are_given_or_made(home: Path, family: str) -> None:
    model, processor = tokprune.load(home / family, processor=True)
    shown = [picture(40, 24), picture(32, 32, 1)]
    inputs = encode(processor, [PROMPT, "what ?"], shown, "cpu", model=model)
    import inspect

    takes = inspect.signature(type(model).forward).parameters
    names = [n for n in ("mm_token_type_ids", "token_type_ids") if n in takes]
    told = {name: inputs[name].clone() for name in names}
    image = inputs["input_ids"] == 99
    for name in names:
        assert torch.equal(told[name] > 0, image), name
        del inputs[name]
    again = add_token_types(model, inputs)
    for name in names:
        assert torch.equal(again[name], told[name]), name
    with torch.inference_mode():
        assert model(**again).logits.shape[:2] == image.shape


# ------------------------------------------------------------------------------- films


@films
def test_frames_of_a_film_are_evenly_spaced(home: Path, tmp_path: Path) -> None:
    for path in (home / "film.mp4", make_film(tmp_path / "film.mkv")):
        clip = read_film(path, 4)
        assert clip.places == [1, 4, 7, 10]
        assert (clip.total, clip.fps) == (12, 4.0)
        levels = [frame.convert("L").getpixel((24, 16)) for frame in clip.frames]
        assert all(abs(level - 20 * place) < 12 for level, place in zip(levels, clip.places))
    assert len(read_film(home / "film.mp4", 99).frames) == 12


@films
def test_what_is_no_film(run: Any, home: Path, tmp_path: Path) -> None:
    (tmp_path / "no.mp4").write_bytes(b"\0" * 64)
    code, _, err = run("qwen3-vl", "--video", tmp_path / "no.mp4")
    assert code == 2
    assert f"--video {tmp_path / 'no.mp4'}: not a film that PyAV can read" in err
    assert "give a folder of its frames" in err
    assert len(err.strip().splitlines()) == 1


def test_without_pyav_the_extra_is_named(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "film.mp4").write_bytes(b"\0" * 64)
    code, _, err = run("qwen3-vl", "--video", tmp_path / "film.mp4")
    assert code == 2
    assert "--video" in err
    assert "pip install 'tokprune[film]'" in err


def test_times_of_frames_reach_the_model(home: Path) -> None:
    model, processor = tokprune.load(home / "qwen2.5-vl", processor=True)
    frames = [picture(32, 32, n) for n in range(4)]
    text = prompt_text(processor, PROMPT, 0, 1)
    spans = []
    for fps in (1.0, 4.0):
        clip = Clip(frames, [1, 4, 7, 10], 12, fps)
        inputs = model_inputs(processor, [text], [[]], [[clip]], model=model)
        spans.append(float(inputs["second_per_grid_ts"][0]))
    assert spans == pytest.approx([6.0, 1.5])  # two frames of every third


def test_videos_for_a_model_of_images(run: Any, home: Path) -> None:
    code, _, err = run("gemma3", *shown(home, "frames"))
    assert code == 2
    assert "takes images only; give frames as images: --image" in err
    code, _, err = run("gemma3", "--video", home / "clip", "--fps", 0)
    assert code == 2
    assert "--fps 0.0: it should be above 0" in err


# ------------------------------------------------------------------------------ pixels


def test_limits_of_pixels_bound_the_tokens(run: Any, home: Path) -> None:
    def tokens(*args: Any) -> int:
        _, processor = tokprune.load(home / "qwen2.5-vl", processor=True, **dict(args))
        made = model_inputs(processor, [prompt_text(processor, "a")], [[picture(48, 40)]])
        return int((made["input_ids"] == 99).sum())

    assert tokens() == 30
    assert tokens(("max_pixels", 1024)) <= 16
    assert tokens(("min_pixels", 2304), ("max_pixels", 9000)) >= 36
    _, whole, _ = run("qwen2.5-vl", *shown(home, "image"), "--method", "grid", "--keep", 0.5)
    code, small, err = run(
        "qwen2.5-vl", *shown(home, "image"), "--method", "grid", "--keep", 0.5, "--max-pixels", 1024
    )
    assert code == 0, err
    assert small["trace"] != whole["trace"]


def test_limits_that_make_no_sense(run: Any, home: Path) -> None:
    code, _, err = run("gemma3", *shown(home, "image"), "--max-pixels", 1024)
    assert code == 2
    assert "max_pixels=1024: Gemma3Processor shows images in sizes of its own" in err
    code, _, err = run("qwen2-vl", *shown(home, "image"), "--min-pixels", 9999)
    assert code == 2
    assert "min_pixels should not be above max_pixels" in err
    with pytest.raises(ValueError, match="max_pixels=9: of transformers' processor"):
        tokprune.load(home / "qwen2-vl", max_pixels=9)
    with pytest.raises(ValueError, match="max_pixels=0 should be a number of pixels"):
        limit_pixels(None, None, 0)


# -------------------------------------------------------------------- frames as patches


def test_patches_of_a_still_video_are_those_of_the_image(home: Path) -> None:
    """Two equal frames are to the tower what an image is, which is shown twice."""
    _, processor = tokprune.load(home / "qwen2.5-vl", processor=True)
    image = picture(40, 24)
    still = processor.image_processor(images=[image], return_tensors="pt")
    options = json.loads((home / "qwen2.5-vl" / "video_preprocessor_config.json").read_text())
    for by_frame in (True, False):
        moving = PatchedVideos(options, by_frame)([[image, image]])
        assert moving["video_grid_thw"].tolist() == still["image_grid_thw"].tolist()
        torch.testing.assert_close(
            moving["pixel_values_videos"], still["pixel_values"], atol=2e-2, rtol=0
        )


@pytest.mark.parametrize(
    ("size", "frames", "wanted"),
    [
        ((40, 48), 1, (40, 48)), ((43, 47), 1, (40, 48)), ((400, 480), 1, (40, 48)),
        ((8, 8), 1, (16, 16)), ((40, 48), 4, (16, 24)), ((4, 40), 2, (8, 80)),
    ],
)  # fmt: skip
def test_sizes_in_whole_cells(size: tuple[int, int], frames: int, wanted: tuple[int, int]) -> None:
    assert fitted(*size, 8, 256, 2304, frames) == wanted


def test_videos_that_are_none(home: Path) -> None:
    _, processor = tokprune.load(home / "internvl", processor=True)
    frames = [picture(24, 24, n) for n in range(3)]
    if isinstance(getattr(processor, "video_processor", None), PatchedVideos.__mro__[1]):
        with pytest.raises(ValueError, match="should be a list of a video's frames"):
            processor.video_processor([frames[0]])
        with pytest.raises(ValueError, match="they should have equally many"):
            processor.video_processor([frames, frames[:2]])


def test_llava_still_answers(tmp_path: Path) -> None:
    folder = tiny_processor.save(tmp_path)
    _, processor = tokprune.load(folder, processor=True)
    made = encode(processor, [PROMPT], [picture(30, 30)], "cpu")
    assert set(made) == {"input_ids", "attention_mask", "pixel_values"}
