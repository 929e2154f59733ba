"""Requests as lmms-eval makes them, on the embedded benchmark, and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lmms_eval.api.instance import Instance

from tokprune.eval.benchmarks.base import Item
from tokprune.eval.benchmarks.mini import MiniBenchmark
from tokprune.integrations.lmms_eval.tasks import mini

BENCHMARK = MiniBenchmark()


def items(number: int) -> list[Item]:
    """The first questions of the test split, types in turn."""
    return BENCHMARK.items(mini.SPLIT, limit=number)


def requests(
    lm: Any, chosen: Sequence[Item], see: Callable[[Any], Any] = mini.doc_to_visual
) -> list[Any]:
    """``generate_until`` requests for a model, which is told of the documents."""
    docs = [mini._doc(item) for item in chosen]
    lm.task_dict["t"] = {"test": docs}

    def messages(doc: Any) -> list[dict[str, Any]]:
        content = [{"type": "image", "url": image} for image in see(doc)]
        return [{"role": "user", "content": [*content, {"type": "text", "text": doc["question"]}]}]

    made = []
    for number, item in enumerate(chosen):
        options = {"max_new_tokens": 8, "until": ["\n\n"]}
        where = (number, "t", "test")
        arguments = (
            (item.question, options, see, *where)
            if lm.is_simple
            else (item.question, messages, options, *where)
        )
        about = {"task": "t", "doc_id": number, "repeats": 1}
        made.append(Instance("generate_until", arguments, 0, about))
    return made


def told(results: Sequence[Any]) -> list[dict[str, Any]]:
    """What is logged of every answer."""
    return [result.token_counts.to_dict()["tokprune"] for result in results]


def model_of(lm: Any) -> Any:
    """The transformers model inside."""
    return lm._tokprune.observer.bound.model


def inputs_of(lm: Any) -> list[dict[str, Any]]:
    """What the model's own ``generate`` is given from now on."""
    seen: list[dict[str, Any]] = []
    own = lm._tokprune.observer._generate

    def generate(**kwargs: Any) -> Any:
        seen.append(kwargs)
        return own(**kwargs)

    lm._tokprune.observer._generate = generate
    return seen
