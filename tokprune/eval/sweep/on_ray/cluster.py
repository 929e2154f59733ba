"""A connection to a Ray cluster, with the workers that were started over it."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tokprune.eval.sweep.on_ray.worker import Worker

#: seconds in which a cluster should accept a connection
_KNOCK = 10.0
_MISSING = "executor=ray needs ray, which is not installed: pip install 'tokprune[ray]'"


def check_ray() -> None:
    """Whether Ray can be used.

    Raises:
        ImportError: it is not installed; says what to do.
    """
    try:
        from ray import exceptions  # noqa: F401  (a folder named ray would do for "import ray")
    except ImportError as error:
        raise ImportError(_MISSING) from error


def check_address(address: str | None) -> None:
    """Whether a cluster answers, before a model is loaded for nothing.

    Raises:
        ConnectionError: see :class:`Cluster`.
    """
    if address != "local":  # one would be started
        with Cluster(address):
            pass


class LostError(RuntimeError):
    """A worker has died, or its node has gone; what it had in hand is not answered."""


class Cluster:
    """Use as a context manager; on exit all workers end.

    Args:
        address: of the cluster, see :class:`tokprune.eval.sweep.settings.Settings`.

    Raises:
        ConnectionError: on entry, there is no cluster at the address, or one of another version of
            Ray or Python.
    """

    def __init__(self, address: str | None) -> None:
        import ray

        self.ray: Any = ray
        self.address = address or os.environ.get("RAY_ADDRESS") or "auto"
        self.actors: list[Any] = []

    def __enter__(self) -> Cluster:
        self.ours = not self.ray.is_initialized()
        if self.ours:
            try:
                _knock(self.address)
                with _own_signals():
                    self.ray.init(self.address, log_to_driver=False, logging_level="warning")
            except Exception as error:  # of many kinds: what the address is decides
                raise ConnectionError(
                    f"address={self.address!r}: {_line(error)}; it should be host:port of a "
                    "running Ray cluster ('ray start --head' starts one), 'auto' or 'local'"
                ) from error
        return self

    def __exit__(self, *_: Any) -> None:
        for actor in self.actors:
            self.ray.kill(actor)
        self.actors.clear()
        if self.ours:
            with _own_signals():
                self.ray.shutdown()

    # ------------------------------------------------------------------ places

    def nodes(self) -> list[dict[str, float]]:
        """Of every living node its resources."""
        return [node["Resources"] for node in self.ray.nodes() if node["Alive"]]

    def start(self, device: str, threads: int | None) -> Any:
        """A worker, which Ray puts where there is room, now or later."""
        need = needed(device, threads)
        actor_class = self.ray.remote(Worker).options(
            num_cpus=need["CPU"], num_gpus=need.get("GPU", 0), scheduling_strategy="SPREAD"
        )
        actor = actor_class.remote(device, threads)
        self.actors.append(actor)
        return actor

    def end(self, actor: Any) -> None:
        """End a worker; its place is free for others."""
        self.actors.remove(actor)
        self.ray.kill(actor)

    # ------------------------------------------------------------------ calls

    def wait(self, calls: Sequence[Any], seconds: float) -> list[Any]:
        """The calls that have ended, at least one, or none after so many seconds."""
        return list(self.ray.wait(list(calls), timeout=seconds)[0])

    def result(self, call: Any) -> Any:
        """What a call that has ended came to.

        Raises:
            LostError: its worker was lost.
            Exception: what it raised.
        """
        raised = self.ray.exceptions
        try:
            return self.ray.get(call)
        except raised.RayActorError as error:
            if getattr(error, "_actor_init_failed", False):
                raise ValueError(f"could not start: {_last(error)}") from error
            raise LostError(_line(error)) from error
        except (
            raised.ObjectLostError, raised.OutOfMemoryError, raised.WorkerCrashedError,
            raised.NodeDiedError,
        ) as error:  # fmt: skip
            raise LostError(_line(error)) from error
        except raised.RayTaskError as error:
            raise error.cause from error


def needed(device: str, threads: int | None) -> dict[str, int]:
    """Resources of one worker: a GPU, or as many cores as it has threads."""
    return {"CPU": 1, "GPU": 1} if device == "cuda" else {"CPU": threads or 1}


def places(nodes: Sequence[dict[str, float]], need: dict[str, int]) -> int:
    """How many workers fit on all nodes at once, if nobody else is there."""
    return sum(
        min(int(node.get(name, 0) // number) for name, number in need.items()) for node in nodes
    )


def _knock(address: str) -> None:
    """Fail at once where nobody listens; Ray would try for minutes.

    Raises:
        OSError: nobody does.
    """
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "/" not in host:
        with socket.create_connection((host, int(port)), timeout=_KNOCK):
            pass


@contextmanager
def _own_signals() -> Iterator[None]:
    """Ray takes over SIGTERM, by which a sweep is to end as by Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _line(error: Exception) -> str:
    """The first line of an error's text."""
    return next((x.strip() for x in str(error).splitlines() if x.strip()), type(error).__name__)


def _last(error: Exception) -> str:
    """The last line, where a traceback says what was raised."""
    return next(x.strip() for x in reversed([type(error).__name__, *str(error).splitlines()])
                if x.strip())  # fmt: skip
