"""An lmms-eval model of the tests: batches, reorders them, and has an option of a method's name."""

from __future__ import annotations

from typing import Any

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from transformers import AutoProcessor, LlavaForConditionalGeneration

from tokprune.inputs.prompts import encode

#: how the tests name it
START = "base=test_batched,pretrained=mini"


class Batched(lmms):
    """Longest question first, several at a time."""

    def __init__(
        self, pretrained: str, batch_size: int = 1, device: str = "cpu", keep: str = "all"
    ) -> None:
        super().__init__()
        self.keep, self.batch_size = keep, batch_size
        self.wrapped = LlavaForConditionalGeneration.from_pretrained(
            pretrained, dtype=torch.float32
        )
        self.processor = AutoProcessor.from_pretrained(pretrained)

    def generate_until(self, requests: list[Any]) -> list[str]:
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].args[0]))
        texts = [""] * len(requests)
        for at in range(0, len(order), self.batch_size):
            rows = order[at : at + self.batch_size]
            for row, text in zip(rows, self._answers([requests[i].args for i in rows])):
                texts[row] = text
        return texts

    def _answers(self, arguments: list[tuple[Any, ...]]) -> list[str]:
        visuals = [see(self.task_dict[task][split][doc])
                   for _, _, see, doc, task, split in arguments]  # fmt: skip
        images = [image for own in visuals for image in own]
        questions = [a[0] for a in arguments]
        if images:
            inputs = encode(self.processor, questions, images, "cpu")
        else:
            texts = [f"USER: {question} ASSISTANT:" for question in questions]
            inputs = self.processor.tokenizer(texts, padding=True, return_tensors="pt")
        options = {k: v for k, v in arguments[0][1].items() if k in ("max_new_tokens",)}
        out = self.wrapped.generate(**inputs, **options, do_sample=False)
        new = out[:, inputs["input_ids"].shape[1] :]
        return list(self.processor.batch_decode(new, skip_special_tokens=True))

    def generate_until_multi_round(self, requests: list[Any]) -> list[list[str]]:
        plain = [
            Instance("generate_until", (*r.args[:3], *r.args[4:]), 0, r.metadata) for r in requests
        ]
        return [[text] for text in self.generate_until(plain)]
