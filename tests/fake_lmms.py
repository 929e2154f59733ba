"""Stands in for lmms-eval in environments that lack it: tasks over a small benchmark, and, run as
a script, a process that reads a trial's configuration and logs samples as lmms-eval does.

What the process does beside that is told in the environment variable ``FAKE_LMMS``, a JSON object
of behaviour by trial: "fail" (status 3), "quiet" (status 0, nothing logged), "hang", "slow", or the
name of a task that is left out.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

TASKS = ("fake_count", "fake_place")
GENERATED = 2


class Docs(list[dict[str, Any]]):
    """Documents of a task."""


class FakeTask:
    """What the harness uses of an lmms-eval task, over one type of question of a benchmark."""

    config = SimpleNamespace(dataset_path="fake/images", doc_to_choice=None)
    _metric_fn_list = ("accuracy",)

    def __init__(self, benchmark: Any, kind: str, images: bool = True) -> None:
        self.benchmark, self._images = benchmark, images
        self._items = benchmark.items(None, [kind])
        self.eval_docs = self.eval_docs_no_media = Docs(
            {"n": n, "question": item.question, "answers": list(item.answers),
             "image_id": item.image_id}
            for n, item in enumerate(self._items)
        )  # fmt: skip

    def doc_to_visual(self, doc: dict[str, Any]) -> list[Any]:
        return [self.benchmark.image(self._items[doc["n"]])] if self._images else []

    def doc_to_text(self, doc: dict[str, Any]) -> str:
        return str(doc["question"])

    def doc_to_target(self, doc: dict[str, Any]) -> list[str]:
        return list(doc["answers"])


def sample(config: dict[str, Any], task: str, doc_id: int) -> dict[str, Any]:
    """A logged sample; correct or incorrect by the hash of the model arguments and the document."""
    told = config["model_args"] if "none" not in Path.cwd().name else "none"
    chance = hashlib.sha256(f"{told}/{task}/{doc_id}".encode()).digest()[0]
    right = chance < 128 or ("control" not in told and "setting" not in told)
    return {
        "doc_id": doc_id, "target": "house", "filtered_resps": "house" if right else "lake",
        "token_counts": [{"input_tokens": 50, "output_tokens": GENERATED, "tokprune": {
            "images": 1, "tokens_in": 36, "tokens_last": 9.0 if "setting" in told else 36.0,
            "tokens_mean": 9.0 if "setting" in told else 36.0, "macs": 1000,
            "macs_unpruned": 4000, "kv_bytes": 100, "kv_bytes_unpruned": 400, "prompt_tokens": 50,
            "new_tokens": GENERATED, "prefill_seconds": 0.5, "seconds": 0.75, "status": "ok",
            "error": None,
        }}],
        "doc_hash": "0" * 64, "accuracy": float(right), "input": "?",
    }  # fmt: skip


def main(config_path: str) -> int:
    """The process: ``--config FILE`` in the trial's folder."""
    config = json.loads(Path(config_path).read_text())
    trial = Path.cwd().name
    how = json.loads(os.environ.get("FAKE_LMMS", "{}")).get(trial, "")
    documents = json.loads(os.environ["FAKE_LMMS_DOCUMENTS"])
    sizes = {task: documents[task] for task in config["tasks"].split(",")}
    if "limit" in config:
        sizes = {task: min(size, config["limit"]) for task, size in sizes.items()}
    total = sum(sizes.values())
    if how == "hang":
        print(f"pid {os.getpid()}", flush=True)
        time.sleep(600)
    for done in range(1, total + 1):
        print(f"\rtokprune:  50%|███  | {done}/{total} [00:01<00:01, 1.0it/s]", end="",
              file=sys.stderr, flush=True)  # fmt: skip
        time.sleep(0.2 if how == "slow" else 0)
    if how == "fail":
        print("\nRuntimeError: out of luck", file=sys.stderr)
        return 3
    if how == "quiet":
        print("\nError during evaluation: judge is away.", file=sys.stderr)
        return 0
    folder = Path(config["output_path"]) / "a__model"
    folder.mkdir(parents=True)
    results = {}
    for task, size in sizes.items():
        samples = [sample(config, task, doc_id) for doc_id in range(size)]
        results[task] = {
            "alias": task, "accuracy,none": sum(s["accuracy"] for s in samples) / size,
            "accuracy_stderr,none": "N/A", "samples": size,
        }  # fmt: skip
        if task != how:
            lines = "".join(json.dumps(s) + "\n" for s in samples)
            (folder / f"20260101_000000_samples_{task}.jsonl").write_text(lines)
    (folder / "20260101_000000_results.json").write_text(json.dumps({"results": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[sys.argv.index("--config") + 1]))
