"""Checkpoints as others made them: which of their files may be opened, and which one is at fault
where loading fails."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from huggingface_hub.constants import HF_HUB_CACHE
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from tokprune.files import read_object

_SAFE = ".safetensors"
_INDEX = ".safetensors.index.json"
#: transformers runs this file of a folder: in 4 whatever it is told, in 5 where code is trusted
_OWN_GENERATE = Path("custom_generate") / "generate.py"
_ASKS_FOR_CODE = (
    "its config asks for code of its own (auto_map), which runs only where you allow it: "
    "trust_remote_code=True (on the command line --trust-remote-code)"
)
_ONLY_SAFE = "weights are read from safetensors files inside the model's own folder only"


def check_place(path: str, subfolder: str = "") -> None:
    """What is named as a model is a folder with a config, or may be a name on the hub.

    Raises:
        OSError: neither; says what is there instead.
    """
    place = Path(path)
    if place.is_file():
        raise NotADirectoryError(
            f"model {path}: is a file; it should be the folder of a model, or a hub name"
        )
    if not place.is_dir():
        # hub names are NAME or OWNER/NAME
        if path.startswith((".", "/", "~")) or path.count("/") > 1 or not path:
            raise FileNotFoundError(f"model {path or repr(path)}: no such folder")
        return
    if not (place / subfolder / "config.json").is_file():
        raise FileNotFoundError(
            f"model {path}: holds no {PurePosixPath(subfolder) / 'config.json'}; it should be a "
            "folder that transformers' save_pretrained has written"
        )
    told = read_object(place / subfolder / "config.json", "model")
    if not isinstance(told.get("model_type"), str):
        raise OSError(
            f"model {path}: config.json has model_type={told.get('model_type')!r}; it should name "
            "the kind of the model"
        )


def check_no_code(path: str, subfolder: str = "", mapped: bool = False) -> None:
    """No code of the folder's own would run on loading, though none is trusted.

    Args:
        mapped: its config files must not even ask for any (``auto_map``): a loader is used that
            would ask the user.

    Raises:
        OSError: some would; names the file.
    """
    folder = Path(path) / subfolder
    if not folder.is_dir():
        return
    if (folder / _OWN_GENERATE).exists():
        raise OSError(
            f"model {path}: {_OWN_GENERATE.as_posix()} is code that would run; read it, then "
            "delete it or allow it: trust_remote_code=True (on the command line "
            "--trust-remote-code)"
        )
    for file in sorted(folder.glob("*config.json")) if mapped else ():
        if "auto_map" in read_object(file):
            raise OSError(
                f"model {path}: {file.name} asks for code of its own (auto_map), which is not run; "
                "delete that entry to load the model without it"
            )


def check_config(path: str, config: Any, trust_remote_code: bool, subfolder: str = "") -> None:
    """What a config asks for beside its own files: a kernel of the hub is code. Besides, that the
    settings of ``generate`` are no broken file, which transformers takes for none.

    Raises:
        OSError, ValueError: it asks for a kernel, or the file is broken; names it.
    """
    parts = (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ())))
    for part in parts:
        backend = getattr(part, "_attn_implementation", None)
        if not trust_remote_code and isinstance(backend, str) and "/" in backend:
            raise OSError(
                f"model {path}: config.json asks for attn_implementation={backend!r}, code from "
                "the hub; delete that entry"
            )
    file = Path(path) / subfolder / "generation_config.json"
    if file.exists():
        if not file.is_file():
            raise IsADirectoryError(f"model {path}: {file.name} is no file")
        read_object(file, "model")


def check_weights(path: str, config: Any, options: Mapping[str, Any]) -> list[Path]:
    """All files that the weights would be read from are safetensors, and inside the folder (or the
    hub's cache of that model).

    Args:
        path: folder or hub name.
        config: of the model; it can name the file of the weights.
        options: of ``from_pretrained``; those of the hub and ``variant`` say which files are meant.

    Returns:
        The files, as far as they are on this machine.

    Raises:
        OSError: another kind of file, one elsewhere, or one that is missing; names it.
    """
    hub = {name: value for name, value in options.items() if name in _WHICH}
    variant = options.get("variant")
    named = getattr(config, "transformers_weights", None)
    if named is not None:
        _check_name(path, "config.json", named, (_SAFE, _INDEX))
    for file in [_varied(SAFE_WEIGHTS_NAME, variant), _varied(SAFE_WEIGHTS_INDEX_NAME, variant)]:
        found = cached_file(
            path, named or file, _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False, **hub,
        )  # fmt: skip
        if found is not None:
            break
    else:
        return []  # from_pretrained says that there are none, or what is wrong with the hub
    files = [Path(found)]
    local = Path(path) / options.get("subfolder", "") if Path(path).is_dir() else None
    if local is not None:
        _check_inside(path, local, Path(found))
    if found.endswith(".json"):
        shards = read_object(Path(found), f"model {path}:").get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise OSError(f"{found}: 'weight_map' should say which file holds which weight")
        files = []
        for shard in sorted(set(map(str, shards.values()))):
            _check_name(path, Path(found).name, shard, (_SAFE,))
            if local is not None:
                _check_inside(path, local, local / shard)
                files.append(local / shard)
    # where peft is installed, transformers puts an adapter in, and would unpickle it
    if (
        local is not None
        and (local / "adapter_config.json").is_file()
        and importlib.util.find_spec("peft")
        and not (local / "adapter_model.safetensors").is_file()
    ):
        raise OSError(f"model {path}: holds no adapter_model.safetensors; {_ONLY_SAFE}")
    return files


def check_size(path: str, files: Sequence[Path], model: Any) -> None:
    """A model is not far larger than its files: transformers would make up the rest, and a config
    that lost a part describes billions of weights.

    Args:
        files: of the weights; without any nothing is known.
        model: without weights, as its config describes it.

    Raises:
        OSError: it is; says both sizes.
    """
    if not files or getattr(model.config, "quantization_config", None) is not None:
        return
    stored = 0
    for file in files:
        with safe_open(file, framework="pt") as weights:
            names = weights.keys()
            stored += sum(math.prod(weights.get_slice(name).get_shape()) for name in names)
    wanted = sum(parameter.numel() for parameter in model.parameters())
    if wanted > 4 * stored + 10**8:
        raise OSError(
            f"model {path}: config.json describes a model of {wanted:,} weights, and its files "
            f"hold {stored:,}"
        )


#: options of from_pretrained that say which file of a checkpoint is meant
_WHICH = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder",
          "token")  # fmt: skip


def _varied(name: str, variant: str | None) -> str:
    """``model.safetensors`` → ``model.fp16.safetensors``, as transformers names variants."""
    stem, end = name.rsplit(".", 1)
    return name if variant is None else f"{stem}.{variant}.{end}"


def _check_name(path: str, where: str, name: str, ends: tuple[str, ...]) -> None:
    parts = PurePosixPath(name.replace("\\", "/"))
    if not name.endswith(ends):
        what = "is no safetensors file"
    elif parts.is_absolute() or ".." in parts.parts or re.match(r"[A-Za-z]:", name):
        what = "lies outside the folder"
    else:
        return
    raise OSError(f"model {path}: {where} names {name!r}, which {what}; {_ONLY_SAFE}")


def _check_inside(path: str, folder: Path, file: Path) -> None:
    """A file is there, and no link out of the folder; the hub's snapshots link to the blobs of
    their cache."""
    name = file.relative_to(folder).as_posix()
    if not file.exists():
        raise FileNotFoundError(f"model {path}: {name} is missing, and weights are in it")
    real, home = file.resolve(), folder.resolve()
    blobs = [
        place.parent.parent / "blobs" for place in (home, *home.parents)
        if place.parent.name == "snapshots"
    ]  # fmt: skip
    in_cache = real.parent.name == "blobs" and real.is_relative_to(Path(HF_HUB_CACHE).resolve())
    if not in_cache and not any(real.is_relative_to(place) for place in (home, *blobs)):
        raise OSError(
            f"model {path}: {name} is a link to {real}, outside the folder; {_ONLY_SAFE}: copy "
            "the file into it"
        )


@contextlib.contextmanager
def reading(path: str, part: str) -> Iterator[None]:
    """What transformers raises inside, which can be anything, becomes one sentence that names the
    model and the file at fault.

    Args:
        path: folder or hub name.
        part: what is read, where no file can be blamed: ``"config.json"``.

    Raises:
        OSError: a file is broken, or something could not be read.
        ValueError: something does not fit.
    """
    try:
        yield
    except (MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:
        if type(error).__module__.startswith("tokprune") or str(error).startswith(f"model {path}:"):
            raise
        if "trust_remote_code=True" in str(error):
            raise ValueError(f"model {path}: {_ASKS_FOR_CODE}") from None
        found = None
        if (folder := Path(path)).is_dir():
            found = _broken_file(folder) or (_missing_file(folder) if part == "processor" else None)
        if found is None and re.search("size mismatch|ignore_mismatched_sizes", str(error)):
            found = "the weights have other shapes than config.json says"
        if found is None and isinstance(error, ImportError):
            raise
        kind = ValueError if found is None and isinstance(error, ValueError) else OSError
        raise kind(f"model {path}: {found or f'{part}: {_sentence(error)}'}") from error


def _missing_file(folder: Path) -> str | None:
    """What a processor needs and a folder lacks."""
    there = {file.name for file in folder.iterdir()}
    if not there & {"processor_config.json", "preprocessor_config.json"}:
        return "holds no processor_config.json and no preprocessor_config.json"
    if not there & _TOKENIZERS:
        return "holds no tokenizer (tokenizer.json)"
    return None


#: files that tokenizers are read from
_TOKENIZERS = {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
               "sentencepiece.bpe.model", "tekken.json"}  # fmt: skip


def _broken_file(folder: Path) -> str | None:
    """The first file of a checkpoint that cannot be read, and why; None: all can."""
    first = ("config.json", "tokenizer.json", "tokenizer_config.json")
    files = sorted(folder.glob("*.json"), key=lambda f: (f.name not in first, f.name))
    for file in files:
        try:
            read_object(file)
        except (OSError, ValueError) as error:
            return str(error).replace(str(file), file.name, 1)
    if (file := folder / "tokenizer.json").is_file():
        try:
            Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises no class of its own
            return f"tokenizer.json is no tokenizer ({_sentence(error)})"
    for file in sorted(folder.glob(f"*{_SAFE}")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except Exception as error:  # SafetensorError, OSError
            return f"{file.name} is damaged or cut off ({_sentence(error)})"
    for file in sorted(folder.glob("*.jinja")):
        try:
            file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            return f"{file.name}: {error}"
    return None


def _sentence(error: BaseException) -> str:
    """The first line of an error, with its kind where that is no plain error of values."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    plain = isinstance(error, (OSError, ValueError)) and text
    return text if plain else f"{type(error).__name__}: {text}".rstrip(": ")
