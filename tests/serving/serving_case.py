"""The embedded model in vLLM and in transformers, asked the same questions."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from vllm import LLM, SamplingParams

import tokprune
from tokprune.eval.benchmarks.mini.benchmark import MiniBenchmark
from tokprune.methods import make_method
from tokprune.models import resolve

QUESTIONS = 30
#: of an answer, in tokens
LONGEST = 8
ARCHITECTURE = "TokpruneLlavaForConditionalGeneration"
#: for keys and values, in bytes: many engines live side by side
MEMORY = 64 << 20


@dataclass
class Answer:
    """What a model said: the text, tokens of its prompt, log-probabilities of its first token by
    id, the best ones; and the tokens of the image that were left, in order."""

    text: str
    prompt: int
    first: dict[int, float]
    kept: list[int] | None = None


@functools.cache
def questions() -> list[tuple[str, str, Image.Image]]:
    """Question, name of its image, image."""
    benchmark = MiniBenchmark()
    items = benchmark.items(limit=QUESTIONS)
    return [(item.question, item.image_id, benchmark.image(item)) for item in items]


# ------------------------------------------------------------------------------ transformers


@functools.cache
def loaded(folder: str) -> Any:
    return tokprune.load(folder, processor=True, dtype="float32")


@functools.cache
def reference(text: str) -> list[Answer]:
    """Answers of tokprune in transformers with a setting (JSON; "{}": unpruned)."""
    return in_transformers("mini", text, [(question, image) for question, _, image in questions()])


def in_transformers(folder: str, text: str, asked: Sequence[Any]) -> list[Answer]:
    """The same of any checkpoint, asked about images: (question, image)."""
    setting = json.loads(text)
    if not setting:
        return _answers(folder, None, asked)
    name = setting.pop("method")
    with tokprune.compress(loaded(folder)[0], make_method(name, **setting)) as trace:
        return _answers(folder, trace, asked)


def _answers(folder: str, trace: Any, asked: Sequence[Any]) -> list[Answer]:
    model, processor = loaded(folder)
    found = []
    for question, image in asked:
        inputs = processor(images=image, text=prompt_of(question), return_tensors="pt")
        own = generate(model, processor, inputs)
        if trace is not None:
            (image_trace,) = trace.last.images
            left = image_trace.entered.column - image_trace.columns[0]
            own.prompt += len(left) - len(image_trace.columns)
            own.kept = left.tolist()
        found.append(own)
    return found


def generate(model: Any, processor: Any, inputs: Any) -> Answer:
    """The answer of a model of transformers to inputs of its processor."""
    whole = inputs["input_ids"].shape[1]
    with torch.no_grad():
        out = model.generate(
            **inputs, do_sample=False, max_new_tokens=LONGEST, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    text = processor.decode(out.sequences[0, whole:], skip_special_tokens=True)
    first = out.logits[0][0].float().log_softmax(-1).topk(3)
    return Answer(text.strip(), whole, dict(zip(first.indices.tolist(), first.values.tolist())))


# -------------------------------------------------------------------------------------- vLLM


_PROMPT = ["USER: <image>\n{} ASSISTANT:"]


@contextmanager
def prompting(template: str) -> Iterator[None]:
    """Prompts with an image in another form, where it and the question stand."""
    _PROMPT.append(template)
    try:
        yield
    finally:
        _PROMPT.pop()


def prompt_of(question: str) -> str:
    return _PROMPT[-1].format(question)


def engine(
    text: str, folder: str = "mini", architecture: str = ARCHITECTURE, **options: Any
) -> LLM:
    """An engine with a setting (JSON; "": vLLM's own architecture)."""
    setting = json.loads(text) if text else None
    overrides = {"architectures": [architecture], "tokprune": setting} if setting else {}
    return LLM(
        resolve(folder), hf_overrides=overrides,
        **{
            "dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "max_num_seqs": 8,
            "distributed_executor_backend": "uni", "block_size": 32,
            "kv_cache_memory_bytes": MEMORY, **options,
        },
    )  # fmt: skip


def model_of(llm: LLM) -> Any:
    """The model in an engine of this process."""
    (model,) = llm.apply_model(lambda model: model)
    return model


def request(question: str, *images: Image.Image, keep: Any = None, **more: Any) -> dict[str, Any]:
    text = prompt_of(question) if images else f"USER: {question} ASSISTANT:"
    if len(images) > 1:
        text = text.replace("<image>", "<image>" * len(images))
    own: dict[str, Any] = {"prompt": text, **more}
    if images:
        own["multi_modal_data"] = {"image": list(images)}
    if keep is not None:
        own["mm_processor_kwargs"] = {"tokprune": {"keep": keep}}
    return own


def ask(llm: LLM, requests: Sequence[dict[str, Any]]) -> list[Answer]:
    """Answers of an engine."""
    sampling = SamplingParams(temperature=0, max_tokens=LONGEST, logprobs=3)
    found = []
    for out in llm.generate(list(requests), sampling, use_tqdm=False):
        (own,) = out.outputs
        first = {token: value.logprob for token, value in own.logprobs[0].items()}
        found.append(Answer(own.text.strip(), len(out.prompt_token_ids), first))
    return found


def ask_questions(llm: LLM, asked: Sequence[Any] = ()) -> list[Answer]:
    """Its answers to questions (question, name of the image, image), one after the other, with what
    was left of every image."""
    model, seen = model_of(llm), []
    # images are encoded once, whoever asks about them
    kept: dict[str, list[int]] = {}
    model.watch = seen.extend
    answers = []
    for question, name, image in asked or questions():
        seen.clear()
        (own,) = ask(llm, [request(question, image)])
        for left in seen:
            kept[name] = left.place.tolist()
        own.kept = kept.get(name)
        answers.append(own)
    return answers


def furthest(got: Answer, want: Answer) -> float:
    """The largest difference of log-probabilities of the first token, of those that both have, by
    their size where that is above 1."""
    both = got.first.keys() & want.first.keys()
    assert len(both) >= 2
    return max(
        abs(got.first[token] - want.first[token]) / max(1.0, abs(want.first[token]))
        for token in both
    )


def assert_as_in_transformers(
    llm: LLM, folder: str, text: str, prompt: str, asked: Sequence[Any]
) -> list[Answer]:
    """Answers of an engine to questions are those of the same setting in transformers."""
    with prompting(prompt):
        got = ask_questions(llm, asked)
        want = in_transformers(folder, text, [(q, image) for q, _, image in asked])
    assert [own.prompt for own in got] == [own.prompt for own in want]
    assert [own.kept for own in got] == [own.kept for own in want]
    assert max(furthest(a, b) for a, b in zip(got, want)) < 1e-4
    assert [own.text for own in got] == [own.text for own in want]
    return got


def two_images(
    prompt: str, images: Sequence[Any], number: int, apart: int, keep: int
) -> list[dict[str, Any]]:
    """Requests with two of the images each, the second with a keep of its own."""
    requests: list[dict[str, Any]] = [
        {"prompt": prompt.format("w7 w8") + " " + prompt.format("w9"),
         "multi_modal_data": {"image": [images[n], images[(n + apart) % len(images)]]}}
        for n in range(number)
    ]  # fmt: skip
    requests[1]["mm_processor_kwargs"] = {"tokprune": {"keep": keep}}
    return requests


def assert_alike(plain: LLM, others: Sequence[LLM], requests: Sequence[dict[str, Any]]) -> None:
    """Answers of engines to requests together are those of another one to each alone."""
    alone = [own for each in requests for own in ask(plain, [each])]
    for llm in others:
        for got, want in zip(ask(llm, requests), alone, strict=True):
            assert (got.text, got.prompt) == (want.text, want.prompt)
            assert furthest(got, want) < 1e-4


@contextmanager
def not_numbers(model: Any, part: str) -> Iterator[None]:
    """A model of which the last weight of this part is NaN."""
    *_, weight = (own for name, own in model.named_parameters() if part in name)
    before = weight.data.clone()
    weight.data.fill_(float("nan"))
    try:
        yield
    finally:
        weight.data.copy_(before)
