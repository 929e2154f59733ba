"""Inside a process of ``tokprune exec``: started by the ``sitecustomize`` that it is given."""

from __future__ import annotations

import functools
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokprune.files import read_object
from tokprune.integrations.exec.journal import Journal
from tokprune.integrations.exec.patching import Load, patch_loaded, watch_loads

if TYPE_CHECKING:
    from tokprune.methods.base import Method
    from tokprune.trace import Trace

#: what a run's folder says to its processes
RUN = "run.json"


def start(folder: str) -> None:
    """Have the models of this process patched as they are loaded. Nothing is imported for it, so
    that processes without models lose no time."""
    run = read_object(Path(folder) / RUN)
    process = Process(Journal(Path(folder)), run["setting"], run["strict"])
    watch_loads([Load(*load) for load in run["loads"]], process.loaded)


class Process:
    """The models that one process has loaded, by the traces of their patches."""

    def __init__(self, journal: Journal, setting: dict[str, Any], strict: bool) -> None:
        self.journal, self.setting, self.strict = journal, setting, strict
        self.traces: dict[int, tuple[dict[str, Any], Trace]] = {}
        self.shown = False

    @functools.cached_property
    def method(self) -> Method:
        from tokprune.methods.setting import load_setting

        return load_setting(self.setting)

    def loaded(self, load: Load, model: Any) -> None:
        """A model has been loaded: patch it, and tell.

        Raises:
            Exception: of :func:`tokprune.patch`, where the run is strict.
        """
        name = type(model).__name__
        try:
            trace = patch_loaded(load, model, self.method)
        except Exception as error:
            self.journal.write("failed", model=name, reason=f"{type(error).__name__}: {error}")
            if self.strict:
                raise
            print(f"tokprune: {name} is left as it is: {error}", file=sys.stderr)
            return
        if trace is None:
            self._refused(load, model)
            return
        # not before it is needed: this waits for torch
        from tokprune.integrations.exec.watch import watch_text
        from tokprune.trace import Trace

        if self._prefill not in Trace.observers:
            Trace.observers.append(self._prefill)
        known = self._add(name, trace)
        print(f"tokprune: {name}: {trace.method}", file=sys.stderr)
        watch_text(model, functools.partial(self._asked, known))

    def _add(self, name: str, trace: Trace) -> dict[str, Any]:
        """What all events say of a model."""
        known = {"number": len(self.traces) + 1, "model": name, "method": trace.method}
        self.traces[id(trace)] = known, trace
        self.journal.write("loaded", **known)
        return known

    def _refused(self, load: Load, model: Any) -> None:
        from tokprune.families.registry import why_refused

        if load.package != "transformers":
            return
        names = [cls.__name__ for cls in type(model).__mro__]
        reason = next(filter(None, map(why_refused, names)), None)
        if reason is not None:
            self.journal.write("refused", model=names[0], reason=reason)

    def _asked(self, model: dict[str, Any], kind: str, prompts: int) -> None:
        self.journal.write("asked", **model, kind=kind, prompts=prompts)

    def _prefill(self, trace: Trace) -> None:
        from tokprune.integrations.exec.watch import Prompts

        known, _ = self.traces.get(id(trace), (None, None))
        if known is None:  # patched otherwise than by us: a copy of a model, or by the script
            assert trace.last is not None
            known = self._add(trace.last.facts.family, trace)
        self.journal.write("prefill", **known, **asdict(Prompts.of(trace)))
        if not self.shown:
            self.shown = True
            self.journal.write("table", method=trace.method, text=trace.summary())
