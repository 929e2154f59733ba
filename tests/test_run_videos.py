"""``tokprune run --video``: folders of frames and animated images."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_processor
from PIL import Image

from tokprune.cli import app
from tokprune.cli.visuals import open_image, open_video
from tokprune.errors import PictureError


def frame(number: int, side: int = 24) -> Image.Image:
    image = Image.new("RGB", (side, side), (20, 40, 60))
    image.paste((250, 200, 10), (number % side, 4, number % side + 6, 10))
    return image


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    tiny_processor.save_video(root / "video", "llava_next_video")
    tiny_processor.save(root / "images")
    (root / "clip").mkdir()
    for number in range(12):
        frame(number).save(root / "clip" / f"f{number}.png")
    frames = [frame(3 * number) for number in range(6)]
    frames[0].save(root / "clip.webp", save_all=True, append_images=frames[1:], lossless=True)
    return root


@pytest.fixture
def run(home: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*args: Any, model: str = "video") -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            app(["run", "--model", str(home / model), "--prompt", "what ?", "--max-new-tokens", "2",
                 *map(str, args)])  # fmt: skip
        return (caught.value.code, *capsys.readouterr())  # type: ignore[return-value]

    return call


def test_frames_come_in_order_and_evenly(home: Path) -> None:
    def shifts(frames: list[Image.Image]) -> list[int]:
        return [
            next(x for x in range(24) if f.getpixel((x, 6)) == (250, 200, 10)) for f in frames
        ]  # fmt: skip

    # f2 before f10; the middles of four equal stretches
    assert shifts(open_video(home / "clip", 4).frames) == [1, 4, 7, 10]
    assert shifts(open_video(home / "clip", 99).frames) == list(range(12))
    assert shifts(open_video(home / "clip.webp", 3).frames) == [3, 9, 15]
    assert shifts(open_video(home / "clip" / "f5.png", 8).frames) == [5]


def test_a_video_is_answered_and_drawn(run: Any, home: Path, tmp_path: Path) -> None:
    out = tmp_path / "kept.png"
    code, told, err = run(
        "--video", home / "clip", "--frames", 4, "--method", "evs", "--keep", 12, "--overlay", out,
        "--compare", "--json",
    )  # fmt: skip
    assert code == 0, err
    result = json.loads(told)
    assert result["trace"]["images"][0]["frames"] == [0, 4]
    assert {"answer", "answer_unpruned"} <= set(result)
    (image,) = result["trace"]["images"]
    kept = image["stages"][-1]["tokens"]
    assert len(kept) == 12
    assert sum(token["tile"] == 0 for token in kept) == tiny.PATCHES // 4
    with Image.open(out) as drawn:
        assert drawn.width > 300
    code, told, err = run("--video", home / "clip.webp", "--video", home / "clip", "--frames", 6)
    assert code == 0, err
    assert told.strip()


def test_bad_videos_are_refused_in_one_line(run: Any, home: Path, tmp_path: Path) -> None:
    def refused(*args: Any, model: str = "video") -> str:
        code, out, err = run(*args, model=model)
        lines = err.strip().splitlines()
        assert (code, out, len(lines)) == (2, "", 1), err
        return str(lines[0])

    clip = home / "clip"
    assert "takes images only" in refused("--video", clip, model="images")
    assert "no such file or folder" in refused("--video", tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "the folder holds no frames" in refused("--video", tmp_path / "empty")
    film = tmp_path / "film.mp4"
    film.write_bytes(b"\0" * 64)
    assert "give a folder of its frames" in refused("--video", film)
    frame(0).save(tmp_path / "empty" / "0.png")
    frame(0, 30).save(tmp_path / "empty" / "1.png")
    assert "its frames differ in size" in refused("--video", tmp_path / "empty")
    told = refused("--video", clip, "--video", clip / "f1.png")
    assert "equally many frames" in told
    assert "needs an --image or a --video" in refused(
        "--overlay", tmp_path / "x.png", "--method", "evs", "--keep", 12
    )
    with pytest.raises(PictureError, match=r"--image .*: no such file$"):
        open_image(tmp_path / "none.png")
