"""Who a row is: a content hash of everything that can change an answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[2]

#: sources that can change neither an answer nor a recorded number. Everything else counts, so that
#: a new file cannot silently keep stale rows.
_NOT_ANSWERING = (
    "bench",
    "cli",
    "eval/published",
    "eval/recommend.py",
    "eval/report",
    "eval/tune",
    "integrations/clip_retrieval.py",
    "integrations/exec",
    "integrations/llava_v1",
    "testing",
    "trace/overlay.py",
)
#: what counts where lmms-eval asks the questions
_LMMS = "integrations/lmms_eval"

#: files of a checkpoint that decide what it answers
_CHECKPOINT = (
    "*.safetensors",
    "*.safetensors.index.json",
    "added_tokens.json",
    "chat_template*",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer*",
    "video_preprocessor_config.json",
    "vocab.*",
)


def canonical(value: Any) -> str:
    """JSON text that is equal for equal values: sorted keys, no spaces, tuples as lists.

    Raises:
        TypeError, ValueError: something that JSON cannot hold, NaN and infinity included.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """sha256 of the canonical JSON text, hex."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def row_id(run: Mapping[str, Any], trial: Mapping[str, Any], item: str, task: str) -> str:
    """Identity of one answered question.

    Args:
        run: the object of ``run.json`` (its model hash, benchmark version and code are used, and
            its harness where that is not the builtin one).
        trial: one of its ``trials`` (variant, all options, dtype, batch size, seed).
        item: item id.
        task: question type of the item.

    Returns:
        32 hex digits.
    """
    parts = {
        "model": run["model"]["hash"],
        "arm" if run["schema"] == 1 else "variant": trial["variant"],
        "options": trial["options"],
        "task": task,
        "item": item,
        "dtype": trial["dtype"],
        "batch_size": trial["batch_size"],
        "seed": trial["seed"],
        "benchmark": run["benchmark"]["version"],
        "code": run["code"],
    }
    if "harness" in run:
        parts["harness"] = run["harness"]
    return digest(parts)[:32]


def hash_files(files: Iterable[tuple[str, Path]]) -> str:
    """sha256 over names and contents, in the order of the names."""
    total = hashlib.sha256()
    for name, path in sorted(files):
        content = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                content.update(block)
        total.update(f"{name}\0{content.hexdigest()}\n".encode())
    return total.hexdigest()


def code_hash(runtime: Mapping[str, str] | None = None) -> str:
    """Hash of the package's sources but those that cannot change an answer; with ``runtime``
    (library versions, kind of device). What only lmms-eval uses is in it where ``runtime`` names
    ``lmms_eval``."""
    left_out = _NOT_ANSWERING if "lmms_eval" in (runtime or {}) else (*_NOT_ANSWERING, _LMMS)

    def counts(name: str) -> bool:
        return not any(name == part or name.startswith(f"{part}/") for part in left_out)

    files = [
        (name, path)
        for path in _ROOT.rglob("*.py")
        if counts(name := path.relative_to(_ROOT).as_posix())
    ]
    return digest({"sources": hash_files(files), "runtime": dict(runtime or {})})


def checkpoint_hash(folder: Path) -> str:
    """Hash of config, weights, tokenizer and processor of a checkpoint folder.

    Raises:
        OSError: the folder cannot be read, or holds no safetensors.
    """
    found = {path.name: path for pattern in _CHECKPOINT for path in folder.glob(pattern)}
    if not any(name.endswith(".safetensors") for name in found):
        raise OSError(f"{folder}: holds no .safetensors file")
    return hash_files(found.items())


def runtime(device: Any) -> dict[str, str]:
    """Versions and kind of device that can change an answer."""
    import torch
    import transformers

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": str(getattr(device, "type", device)),
    }
