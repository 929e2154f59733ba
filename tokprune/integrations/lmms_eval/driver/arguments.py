"""What lmms-eval is told for a cell: model arguments, configuration, command."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokprune.eval.sweep.loaded_model import Subject
from tokprune.eval.sweep.settings import Settings
from tokprune.eval.sweep.trials import Cell
from tokprune.integrations.lmms_eval.driver.tasks import MODEL

SETTING, CONFIG, LOG, OUTPUT = "setting.json", "config.json", "log.txt", "output"

#: lmms-eval's model for a family of ours
BASES = {"llava-1.5": "llava_hf", "llava-next": "llava_hf"}
#: models of lmms-eval that take one question at a time
SINGLE = frozenset({"llava_hf"})
#: letters that lmms-eval's list of arguments cannot hold
_SPECIAL = frozenset(",\"'[]{}")


@dataclass(frozen=True)
class Base:
    """The lmms-eval model that the plug-in extends, and the names of its arguments."""

    name: str
    parameters: frozenset[str]

    @property
    def batches(self) -> bool:
        """Whether it answers several questions together."""
        return self.name not in SINGLE

    def takes(self, name: str) -> bool:
        return name in self.parameters


def find_base(settings: Settings, subject: Subject) -> Base:
    """The base that the settings name, or the one for the model's family.

    Raises:
        ValueError: see :func:`check_base`, or a family without a usual base.
    """
    name = settings.base or BASES.get(subject.family.name)
    if name is None:
        raise ValueError(
            f"base is missing: no lmms-eval model is known for family {subject.family.name}; "
            "'lmms-eval models' lists what there is"
        )
    return check_base(name, settings)


def check_base(name: str, settings: Settings) -> Base:
    """A base by name, and whether it takes the arguments and the batch size.

    Raises:
        ValueError: unknown base or argument (names the nearest), one that cannot be imported, or a
            batch size that it cannot do.
    """
    for argument, value in settings.model_args.items():
        _check_text(f"model_args: {argument}", str(value))
    base = Base(name, base_parameters(name, settings.model_args))
    if settings.batch_size > 1 and not base.batches:
        raise ValueError(
            f"batch_size={settings.batch_size}: lmms-eval's {name} answers one question at a time"
        )
    return base


def base_parameters(name: str, model_args: Mapping[str, Any]) -> frozenset[str]:
    """Names of the arguments that a model of lmms-eval has; the plug-in's own reader checks it and
    ``model_args``."""
    from tokprune.integrations.lmms_eval.arguments import parameters, read_arguments

    try:
        read = read_arguments(_joined({"base": name, **model_args}))
    except ImportError as error:
        raise ValueError(f"base={name!r} cannot be used: {error}") from error
    return frozenset(parameters(read.base_class)[0])


def _joined(args: Mapping[str, Any]) -> str:
    return ",".join(f"{name}={value}" for name, value in args.items())


def _check_text(what: str, text: str) -> None:
    if _SPECIAL & set(text) or text != text.strip() or not text:
        raise ValueError(
            f"{what} {text!r} cannot be passed to lmms-eval, whose arguments hold no commas, "
            "quotes or brackets"
        )


# --------------------------------------------------------------------------------- a cell


def setting_text(cell: Cell) -> str | None:
    """The JSON file that names the method of a cell; None where the model stays unpatched."""
    if cell.entry["method"] is None:
        return None
    setting = {"method": cell.entry["method"], "options": cell.entry["options"]}
    return json.dumps(setting, indent=1, sort_keys=True) + "\n"


def model_arguments(
    settings: Settings, base: Base, subject: Subject, cell: Cell, pretrained: str
) -> str:
    """The text of ``--model_args``. The setting's content is named by its hash, since lmms-eval
    knows a model by this text only.

    Raises:
        ValueError: the model's path holds letters that such a text cannot.
    """
    _check_text("model", pretrained)
    args: dict[str, Any] = {"base": base.name, "pretrained": pretrained}
    if base.takes("dtype"):
        args["dtype"] = cell.entry["dtype"]
    if subject.device.type == "cpu" and base.takes("device_map"):
        args["device_map"] = "cpu"
    args |= settings.model_args
    setting = setting_text(cell)
    if setting is not None:
        args["setting"] = SETTING
        args["setting_sha"] = hashlib.sha256(setting.encode()).hexdigest()
    elif cell.blind:
        args["control"] = "blind"
    elif cell.smaller is not None:
        args |= {"control": "downsample", "factor": repr(cell.smaller.factor)}
    return _joined(args)


def configuration(
    settings: Settings, model_args: str, tasks: Sequence[str], folders: Sequence[str],
    device: str, batch_size: int,
) -> dict[str, Any]:  # fmt: skip
    """The file for ``lmms-eval --config``, run inside the cell's folder."""
    told: dict[str, Any] = {
        "model": MODEL,
        "model_args": model_args,
        "tasks": ",".join(tasks),
        "batch_size": batch_size,
        "output_path": OUTPUT,
        "log_samples": True,
        "verbosity": "INFO",
        "process_docs_parallel": 1,
        "include_path": list(folders),
    }
    if settings.limit is not None:
        told["limit"] = settings.limit
    if settings.max_new_tokens is not None:
        told["gen_kwargs"] = f"max_new_tokens={settings.max_new_tokens}"
    if device == "cpu":
        told["device"] = "cpu"
    return told


#: how lmms-eval is started
LMMS_EVAL = ("-m", "lmms_eval")
_ACCELERATE = ("-m", "accelerate.commands.launch")
#: what accelerate would otherwise ask for, or take from a file of the user's
_LAUNCH = {"--num_machines": "1", "--mixed_precision": "no", "--dynamo_backend": "no"}


def command(settings: Settings) -> list[str]:
    """Words that run a cell's configuration, in one process or through ``accelerate launch``."""
    what = [*LMMS_EVAL, "--config", CONFIG]
    if settings.processes == 1 and not settings.launch and not settings.launcher:
        return [sys.executable, *what]
    usual = dict(_LAUNCH)
    if "--num_machines" not in settings.launch:
        usual["--main_process_port"] = "0"  # any free one: several sweeps may run on a machine
    elif "--machine_rank" not in settings.launch:
        # every node runs the same words, and they agree on their ranks when they meet
        usual |= {"--rdzv_backend": "c10d", "--machine_rank": "0"}
    given = [word for name, value in usual.items() if name not in settings.launch
             for word in (name, value)]  # fmt: skip
    many = [] if settings.processes == 1 else ["--multi_gpu"]
    return [
        *settings.launcher, sys.executable, *_ACCELERATE, "--num_processes",
        str(settings.processes), *many, *given, *settings.launch, *what,
    ]  # fmt: skip


def environment(device: str, inherited: Mapping[str, str]) -> dict[str, str]:
    """Environment of the child."""
    told = {**inherited, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    if device == "cpu":
        told["ACCELERATE_USE_CPU"] = "true"
    return told
