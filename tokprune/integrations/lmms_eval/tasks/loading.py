"""lmms-eval's tasks by name: groups and tags opened, unknown names refused with the nearest."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokprune.errors import did_you_mean
from tokprune.eval.sweep.identity import digest, hash_files
from tokprune.integrations.lmms_eval.tasks import TASKS
from tokprune.integrations.lmms_eval.tasks.scores import check_task

#: under this name the plug-in is known to lmms-eval, which picks prompts by the model's name
MODEL = "tokprune"


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks with their data."""

    #: task objects by name, in the order of the names that were loaded
    tasks: Mapping[str, Any]
    #: names of groups and tags among them → their tasks
    groups: Mapping[str, tuple[str, ...]]
    #: hash of what defines each task
    versions: Mapping[str, str]
    #: names that make lmms-eval run all of them, groups by their own name so that it aggregates
    called: tuple[str, ...]


def lmms_version() -> str:
    """Version of lmms-eval.

    Raises:
        ValueError: it is not installed; says how to get it.
    """
    if importlib.util.find_spec("lmms_eval") is None:
        raise ValueError(
            "harness lmms-eval needs lmms-eval, which is not installed: "
            "pip install 'tokprune[eval]'"
        )
    try:
        return importlib.metadata.version("lmms-eval")
    except importlib.metadata.PackageNotFoundError:  # put on the path by hand
        return str(getattr(importlib.import_module("lmms_eval"), "__version__", "unknown"))


def task_folders(further: Sequence[str]) -> list[str]:
    """Folders with tasks beside lmms-eval's own: this package's, then those of the user."""
    return [str(TASKS), *(str(Path(f).expanduser().resolve()) for f in further)]


def load_tasks(names: Sequence[str], include_path: Sequence[str]) -> LoadedTasks:
    """Load tasks and their data.

    Args:
        names: tasks, groups or tags of lmms-eval; ``*`` stands for any part of a name.
        include_path: further folders of tasks.

    Raises:
        ValueError: lmms-eval is not installed, an unknown name, a task that cannot be loaded or
            that logs no score.
    """
    lmms_version()
    _quiet()
    from lmms_eval.tasks import TaskManager, get_task_dict

    manager = TaskManager("ERROR", include_path=task_folders(include_path), model_name=MODEL)
    for name in names:
        if not manager.match_tasks([name]):
            _unknown(name, manager.all_tasks)
    wanted = [one for name in names for one in sorted(manager.match_tasks([name]))]
    found: dict[str, Any] = {}
    groups: dict[str, tuple[str, ...]] = {}
    for name in dict.fromkeys(wanted):
        try:
            loaded = get_task_dict([name], manager)
        except Exception as error:  # whatever a task's own code or the hub raises
            text = " ".join(str(error).split())[:300]
            raise ValueError(
                f"task {name!r} cannot be loaded ({type(error).__name__}: {text})"
            ) from error
        leaves = _leaves(loaded)
        if list(leaves) != [name]:
            groups[name] = tuple(leaves)
        found.update(leaves)
    for name, task in found.items():
        check_task(name, getattr(task, "_metric_fn_list", ()))
    versions = {
        name: _version(task, manager.task_index.get(name, {}).get("yaml_path"))
        for name, task in found.items()
    }
    return LoadedTasks(found, groups, versions, called(wanted, groups))


def called(wanted: Sequence[str], groups: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Names that cover every task once: lmms-eval refuses groups that share tasks."""
    names: list[str] = []
    covered: set[str] = set()
    for name in sorted(dict.fromkeys(wanted), key=lambda name: name not in groups):
        members = groups.get(name, (name,))
        fresh = [task for task in members if task not in covered]
        names += [name] if len(fresh) == len(members) else fresh
        covered.update(members)
    return tuple(names)


def _unknown(name: str, known: Sequence[str]) -> None:
    hint = did_you_mean(name, known, 3)
    raise ValueError(
        f"task {name!r} is unknown to lmms-eval; 'lmms-eval tasks' lists what it has.{hint}"
    )


def _leaves(tasks: Mapping[Any, Any]) -> dict[str, Any]:
    """Task objects of nested groups, by name."""
    found: dict[str, Any] = {}
    for name, task in tasks.items():
        if isinstance(task, Mapping):
            found.update(_leaves(task))
        elif isinstance(task, tuple):
            if task[1] is not None:
                found[str(name)] = task[1]
        else:
            found[str(name)] = task
    return found


def _version(task: Any, yaml_path: Any) -> str:
    """Hash of the files that define a task, and of the number of its documents."""
    files: list[tuple[str, Path]] = []
    if isinstance(yaml_path, str):
        folder = Path(yaml_path).parent
        files = [
            (path.name, path)
            for path in sorted(folder.iterdir())
            if path.is_file() and (path.suffix in (".py", ".yaml") or path.name.endswith("_yaml"))
        ]
    return digest([hash_files(files), len(task.eval_docs)])[:16]


def _quiet() -> None:
    """lmms-eval logs what it does at length; errors are enough here."""
    from loguru import logger

    logger.remove()
    logger.add(sys.stderr, level="ERROR")
    logging.getLogger("lmms_eval").setLevel(logging.ERROR)
