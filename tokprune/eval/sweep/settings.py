"""What to sweep, from options or a YAML or TOML file."""

from __future__ import annotations

import dataclasses
import re
import shlex
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from tokprune.errors import did_you_mean
from tokprune.eval.benchmarks.load import FILE_OPTIONS
from tokprune.eval.sweep.budgets import DEFAULT_KEEP, Budget, parse_budget
from tokprune.eval.sweep.variants import (
    Variant,
    build_variants,
    check_variant,
    parse_option,
    parse_variant,
)

MATCHES = ("mean", "last")
DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")
EXECUTORS = ("local", "ray")


def check_harness_name(name: Any) -> str:
    """A harness that is installed; its name of the release before is taken with a warning.

    Raises:
        ValueError: another one; lists what there is.
    """
    if name == "own":
        warnings.warn("harness 'own' is called 'builtin' now", FutureWarning, stacklevel=4)
        return "builtin"
    known = ("builtin", *sorted(entry_points(group="tokprune.harnesses").names))
    if name not in known:
        raise ValueError(f"harness={name!r} should be one of {', '.join(known)}")
    return str(name)


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a sweep does.

    Args:
        model: folder or hub name.
        out: run folder; made where missing, resumed where it holds the same sweep.
        benchmark: name, or a ``.jsonl``, ``.parquet``, ``.json`` or ``.tsv`` file of questions.
        images: of a file, folder of its images, which may not lie outside; None: the file's own.
        answers: of a file, a second one that has the answers.
        shape: of a file, how its columns are read; None: by their names.
        scoring: of a file, the rule of scores; None: that of its shape.
        prompt_suffix: of a file, text put after every question.
        methods: names, ``"name:option=value"``, or tables with a name; empty: every method.
        keep: budgets, see :func:`tokprune.eval.sweep.budgets.parse_budget`.
        tasks: question types; None: all of the benchmark.
        split: of the benchmark; None: its first.
        limit: most items, balanced over the tasks.
        seeds: for methods that draw, and the control ``random``: one draw is luck.
        match: what has to hit a budget: the "mean" of visual tokens over the decoder layers, or
            the tokens left after the "last" pruning.
        dtype: "auto": as the checkpoint says; float16 weights run in float32 on a CPU.
        device: "auto" takes CUDA where there is some.
        trust_remote_code: whether code of the checkpoint's own may run.
        batch_size: questions that are answered together; None: 16, in lmms-eval 1.
        max_new_tokens: longest answer; None: as the benchmark, or each task, says.
        controls: run ``blind``, ``random``, ``grid``, ``pool`` and ``downsample`` as well.
        variants: run the published variants of the methods as well.
        noise: run the unpruned model at another batch size and another dtype first.
        latency: time every trial at the end.
        latency_rounds: measurements of each part; None: five, or fewer where they would take longer
            than the answers did.
        share: run the encoder once for all trials that leave it alone.
        calibrate: items on which budgets are matched.
        fresh: throw away what the run folder holds.
        executor: where the builtin harness answers: "local" in this process, or "ray" in workers
            of a Ray cluster, with one model each. Rows are the same, and a run folder may be
            continued by the other.
        address: of the Ray cluster, ``host:port``; None: what RAY_ADDRESS says, else the one that
            runs on this machine; "local": one of this machine alone, for this sweep.
        workers: most workers on Ray; None: as many as the cluster has places for.
        harness: who asks the questions: "builtin", or "lmms-eval" in processes of its own, one per
            trial. There ``tasks`` names lmms-eval's tasks (groups and tags as well), and ``limit``
            counts per task, as lmms-eval does; ``benchmark``, ``split``, ``share``,
            ``latency_rounds`` and ``executor`` belong to the builtin harness, what follows to
            lmms-eval.
        base: id of the lmms-eval model that the method is put into; None: by the model's family.
        processes: data-parallel processes, started by ``accelerate launch``.
        launch: further arguments of ``accelerate launch``, in one text or as a list.
        launcher: words put before it, which start it on every node (``srun --nodes 2 …``).
        include_path: folders with further tasks; those of this package are always known.
        model_args: further arguments of the base, as a table or ``"name=value"`` texts.

    Raises:
        ValueError: a value that cannot be used; names it and says what would be right.
    """

    model: str
    out: str
    benchmark: str = "mini"
    images: str | None = None
    answers: str | None = None
    shape: str | None = None
    scoring: str | None = None
    prompt_suffix: str | None = None
    methods: tuple[Any, ...] = ()
    keep: tuple[Any, ...] = DEFAULT_KEEP
    tasks: tuple[str, ...] | None = None
    split: str | None = None
    limit: int | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    match: str = "mean"
    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    batch_size: int = None  # type: ignore[assignment]
    max_new_tokens: int | None = None
    controls: bool = True
    variants: bool = False
    noise: bool = True
    latency: bool = True
    latency_rounds: int | None = None
    share: bool = True
    calibrate: int = 8
    fresh: bool = False
    executor: str = "local"
    address: str | None = None
    workers: int | None = None
    harness: str = "builtin"
    base: str | None = None
    processes: int = 1
    launch: tuple[str, ...] = ()
    launcher: tuple[str, ...] = ()
    include_path: tuple[str, ...] = ()
    model_args: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "harness", check_harness_name(self.harness))
        if self.batch_size is None:
            object.__setattr__(self, "batch_size", 1 if self.harness == "lmms-eval" else 16)
        object.__setattr__(self, "model_args", _model_args(self.model_args))
        for name in ("launch", "launcher"):
            if isinstance(words := getattr(self, name), str):
                object.__setattr__(self, name, _words(name, words))
        for name, kind in _KINDS.items():
            value = getattr(self, name)
            if kind == "tuple":
                if value is None and name == "tasks":
                    continue
                value = (value,) if isinstance(value, (str, int, float, Path, Mapping)) else value
                if not isinstance(value, Sequence):
                    raise ValueError(f"{name}={value!r} should be a list")
                object.__setattr__(self, name, tuple(value))
            elif name in ("model", "out", "benchmark", "images", "answers"):
                object.__setattr__(self, name, str(value) if isinstance(value, Path) else value)
        self._check_types()
        for name, choices in (
            ("match", MATCHES), ("dtype", DTYPES), ("device", DEVICES), ("executor", EXECUTORS),
        ):  # fmt: skip
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} should be one of {', '.join(choices)}"
                )
        if not self.keep:
            raise ValueError("keep names no budget; it should hold at least one, for example 64")
        if self.tasks is not None and not self.tasks:
            raise ValueError("tasks names no task; leave it out for all of them")
        if not self.seeds:
            raise ValueError("seeds names no seed; it should hold at least one, for example 0")
        self._check_harness()
        self.budgets()
        for spec in self.methods:
            parse_variant(spec)

    def _check_harness(self) -> None:
        """No setting of the other harness is used."""
        lmms = self.harness == "lmms-eval"
        if lmms and self.executor != "local":
            raise ValueError(
                f"executor={self.executor!r} belongs to harness builtin, and harness is lmms-eval, "
                "which spreads over devices and machines by processes, launch and launcher"
            )
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in _BUILTIN_ONLY if lmms else _LMMS_ONLY:
            value = getattr(self, name)
            if value != defaults[name] and value != {}:
                raise ValueError(
                    f"{name}={_shown(value)} belongs to harness "
                    f"{'builtin' if lmms else 'lmms-eval'}, and harness is {self.harness}"
                )
        for name in _RAY_ONLY:
            if self.executor != "ray" and (value := getattr(self, name)) is not None:
                raise ValueError(
                    f"{name}={value!r} belongs to executor ray, and executor is {self.executor}"
                )
        if lmms and self.tasks is None:
            raise ValueError("tasks is missing; with harness lmms-eval it names lmms-eval's tasks")

    def _check_types(self) -> None:
        for name, kind in _KINDS.items():
            value = getattr(self, name)
            if kind == "int":
                if value is None and name in _NO_NUMBER:
                    continue
                if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                    raise ValueError(f"{name}={value!r} should be a whole number, at least 1")
            elif kind == "bool" and not isinstance(value, bool):
                raise ValueError(f"{name}={value!r} should be true or false")
            elif value is None and name in ("split", "base", "address", *FILE_OPTIONS):
                continue
            elif kind == "str" and not (isinstance(value, str) and value):
                raise ValueError(f"{name}={value!r} should be text")
        for seed in self.seeds:
            if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
                raise ValueError(f"seeds: {seed!r} should be a whole number, at least 0")
        for name in ("tasks", "launch", "launcher"):
            for text in getattr(self, name) or ():
                if not isinstance(text, str):
                    raise ValueError(f"{name}: {text!r} should be text")
        paths = tuple(str(path) if isinstance(path, Path) else path for path in self.include_path)
        for path in paths:
            if not isinstance(path, str) or not Path(path).expanduser().is_dir():
                raise ValueError(f"include_path: {path!r} should be a folder of tasks")
        object.__setattr__(self, "include_path", paths)

    def budgets(self) -> tuple[Budget, ...]:
        """The budgets, each once."""
        parsed = [parse_budget(value) for value in self.keep]
        return tuple({(b.count, b.share): b for b in parsed}.values())

    def compared(self, media: str = "image") -> list[Variant]:
        """What is compared on images (``media`` "image") or videos ("video"), controls first."""
        methods = [parse_variant(spec) for spec in self.methods]
        return build_variants(methods, self.controls, self.variants, media)

    def file_options(self) -> dict[str, Any]:
        """How a file of questions is read; for :func:`tokprune.eval.benchmarks.load_benchmark`."""
        return {name: getattr(self, name) for name in FILE_OPTIONS}

    def to_dict(self) -> dict[str, Any]:
        """All settings in JSON types; methods with their options."""
        table = dataclasses.asdict(self)
        for name in _BUILTIN_ONLY if self.harness == "lmms-eval" else _LMMS_ONLY:
            del table[name]
        table["methods"] = [
            name if not options else {"name": name, **options}
            for name, options in map(parse_variant, self.methods)
        ]
        table["keep"] = [budget.text for budget in self.budgets()]
        return table


#: first word of every setting's annotation
_KINDS = {field.name: re.split(r"\W", str(field.type))[0] for field in dataclasses.fields(Settings)}

#: settings that mean something in one harness only
_BUILTIN_ONLY = (
    "benchmark", *FILE_OPTIONS, "split", "share", "latency_rounds", "executor", "address",
    "workers",
)  # fmt: skip
_LMMS_ONLY = ("base", "processes", "launch", "launcher", "include_path", "model_args")
#: settings that mean something with one executor only
_RAY_ONLY = ("address", "workers")
#: numbers that need not be given
_NO_NUMBER = ("limit", "max_new_tokens", "latency_rounds", "workers")
#: arguments of the model that the sweep sets
_SET_BY_SWEEP = frozenset({
    "base", "pretrained", "method", "keep", "setting", "setting_sha", "control", "factor", "dtype",
    "device", "batch_size",
})  # fmt: skip


def _model_args(value: Any) -> dict[str, Any]:
    """A table of arguments, from one or from ``name=value`` texts."""
    if isinstance(value, Mapping):
        args = dict(value)
    else:
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, Sequence):
            raise ValueError(f"model_args={value!r} should be a table, or name=value texts")
        args = {}
        for text in texts:
            name, item = parse_option(text, "model_args") if isinstance(text, str) else ("", None)
            if name in args or not name:
                what = "is given twice" if name else "should be name=value"
                raise ValueError(f"model_args: {text!r} {what}")
            args[name] = item
    for name, item in args.items():
        if name in _SET_BY_SWEEP:
            raise ValueError(f"model_args: {name!r} is set by the sweep itself")
        if not isinstance(name, str) or not isinstance(item, (str, int, float, bool)):
            raise ValueError(f"model_args: {name!r}={item!r} should be text or a number")
    return args


def _words(name: str, text: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise ValueError(f"{name}={text!r}: {error}") from None


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else repr(value)


def with_options(methods: Sequence[Any], options: Sequence[str]) -> tuple[Any, ...]:
    """Methods with ``"todre.select=k_center"`` options put in; an option changes every variant of
    its method, or makes one where the method is not listed but all methods are meant.

    Raises:
        ValueError: not of that form, an unknown option, or a method that is not swept.
    """
    changes: dict[str, dict[str, Any]] = {}
    for text in options:
        name, dot, rest = text.partition(".")
        if not dot or not name:
            raise ValueError(f"option {text!r} should be method.option=value")
        option, value = parse_option(rest, text)
        changes.setdefault(name.strip().lower(), {})[option] = value
    if not changes:
        return tuple(methods)
    for name, changed in changes.items():
        check_variant(name, changed)
    listed = [parse_variant(spec) for spec in methods]
    if not listed:
        listed = [(v.method, {}) for v in build_variants([], False, False) if v.method]
    for name in changes:
        if name not in dict(listed):
            raise ValueError(f"option of {name!r}: that method is not among the swept ones")
    return tuple({"name": name, **options, **changes.get(name, {})} for name, options in listed)


def read_settings(path: str | Path, **changes: Any) -> Settings:
    """Settings from a YAML or TOML file; ``changes`` (but None) go before what it says.

    Raises:
        OSError: unreadable file.
        ValueError: not YAML or TOML, an unknown key (names the nearest), or a bad value.
    """
    table = {**read_table(path), **{k: v for k, v in changes.items() if v is not None}}
    return make_settings(table, str(path))


def make_settings(table: Mapping[str, Any], where: str) -> Settings:
    """Settings from a table.

    Raises:
        ValueError: an unknown or missing key, or a bad value.
    """
    for name in table:
        if name not in _KINDS:
            hint = did_you_mean(name, _KINDS)
            raise ValueError(f"{where}: setting {name!r} is unknown.{hint}")
    for name in ("model", "out"):
        if name not in table:
            raise ValueError(f"{where}: setting {name!r} is missing")
    return Settings(**table)


def read_table(path: str | Path) -> dict[str, Any]:
    """The table of a YAML or TOML file.

    Raises:
        OSError: unreadable file.
        ValueError: not a table, another kind of file, or a reader that is not installed.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (".yaml", ".yml", ".toml"):
        raise ValueError(f"config {path}: should be a .yaml or a .toml file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"config {path}: {error}") from None
    table = _toml(path, text) if suffix == ".toml" else _yaml(path, text)
    if not isinstance(table, dict):
        raise ValueError(f"config {path}: should be a table of settings")
    return table


def _toml(path: Path, text: str) -> Any:
    try:
        import tomllib
    except ImportError:  # Python 3.10
        try:
            import tomli as tomllib
        except ImportError:
            raise ValueError(
                "TOML files need tomli, which is not installed: pip install 'tokprune[sweep]'"
            ) from None
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ValueError(f"config {path}: {error}") from None


def _yaml(path: Path, text: str) -> Any:
    try:
        import yaml
    except ImportError:
        raise ValueError(
            "YAML files need pyyaml, which is not installed: pip install 'tokprune[sweep]'"
        ) from None
    try:
        return yaml.safe_load(text)
    except RecursionError:
        raise ValueError(f"config {path}: nested too deeply") from None
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        at = "" if place is None else f", line {place.line + 1}"
        problem = getattr(error, "problem", None) or "not valid YAML"
        raise ValueError(f"config {path}{at}: {problem}") from None
