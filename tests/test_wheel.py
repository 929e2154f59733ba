"""The wheel, installed in base form outside the source tree: one package, and it works alone."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(out), str(ROOT)], check=True)
    (made,) = out.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def home(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an ``evals`` and a ``patches`` of its own, and an environment in which the
    wheel is installed with its base requirements alone: those of this environment, linked."""
    home = tmp_path_factory.mktemp("home")
    for name in ("evals", "patches"):
        (home / name).mkdir()
        (home / name / "__init__.py").write_text("raise RuntimeError('not what you look for')\n")
    venv.create(home / "env", with_pip=False)
    site = next((home / "env").glob("lib*/python*/site-packages"))
    for name in base_requirements("tokprune"):
        for path in top_level(name):
            if not (site / path.name).exists():
                (site / path.name).symlink_to(path)
    pip = [sys.executable, "-m", "pip", "--python", str(home / "env" / "bin" / "python"), "install"]
    subprocess.run([*pip, "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    return home


def base_requirements(name: str) -> set[str]:
    """Distributions that ``pip install NAME`` brings, without any extra; ``name`` left out."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        for line in metadata.requires(waiting.pop()) or []:
            needed = Requirement(line)
            if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
                continue
            if needed.name not in found:
                found.add(needed.name)
                waiting.append(needed.name)
    return found


def top_level(name: str) -> Iterator[Path]:
    """Files and folders that a distribution has in site-packages."""
    distribution = metadata.distribution(name)
    site = Path(str(distribution.locate_file("")))
    for part in {file.parts[0] for file in distribution.files or []} - {".."}:
        if (site / part).exists():
            yield site / part


def run(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [str(home / "env" / "bin" / words[0]), *words[1:]], cwd=home, env=environment,
        capture_output=True, text=True,
    )  # fmt: skip


def test_holds_one_package(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    (info,) = tops - {"tokprune"}
    assert info.endswith(".dist-info")
    for needed in (
        "py.typed", "models/mini/model.safetensors", "models/mini-video/model.safetensors",
        "eval/report/page.html.j2", "eval/published/figures/todre.json",
        "eval/benchmarks/mini/glyphs.png", "integrations/lmms_eval/tasks/yaml/tokprune_mini.yaml",
    ):  # fmt: skip
        assert f"tokprune/{needed}" in names


def test_lists_methods(home: Path) -> None:
    done = run(home, "tokprune", "methods", "--json")
    assert done.returncode == 0, done.stderr
    assert '"name": "divprune"' in done.stdout


def test_answers_with_the_embedded_model(home: Path) -> None:
    Image.new("RGB", (192, 192), "red").save(home / "red.png")
    done = run(
        home, "tokprune", "run", "--model", "mini", "--image", "red.png", "--prompt",
        "what number is shown ?", "--method", "divprune", "--keep", "64", "--overlay", "kept.png",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "64" in done.stdout
    assert (home / "kept.png").is_file()


@pytest.mark.parametrize("command", ["sweep", "report"])
def test_names_the_extra_that_evaluation_needs(home: Path, command: str) -> None:
    words = ["--model", "mini", "--out", "run"] if command == "sweep" else ["run"]
    done = run(home, "tokprune", command, *words)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "pip install 'tokprune[sweep]'" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_reads_the_published_figures(home: Path) -> None:
    done = run(home, "tokprune", "reproduce", "--paper", "visionzip", "--format", "json")
    assert done.returncode == 0, done.stderr
    assert "visionzip" in done.stdout


def test_runs_a_script_whose_model_it_patches(home: Path) -> None:
    script = home / "script.py"
    script.write_text(
        "import torch\n"
        "from tokprune.models import resolve\n"
        "from transformers import LlavaForConditionalGeneration as Llava\n"
        "model = Llava.from_pretrained(resolve('mini'))\n"
        "ids = torch.full((1, 600), 5); ids[:, 4:580] = model.config.image_token_id\n"
        "model(input_ids=ids, pixel_values=torch.zeros(1, 3, 192, 192))\n"
    )
    done = run(home, "tokprune", "exec", "--method", "grid", "--keep", "64", "--", str(script))
    assert done.returncode == 0, done.stderr
    assert "576 -> 64" in done.stderr


def test_nothing_is_imported_from_the_checkout(home: Path) -> None:
    done = run(home, "python", "-c", "import tokprune; print(tokprune.__file__)")
    assert done.stdout.startswith(str(home / "env"))
