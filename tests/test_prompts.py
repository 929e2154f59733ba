"""Prompts as users have them: with placeholders of any model, or whole conversations already."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import family_processors
import pytest
import tiny_processor
from pictures import landscape
from transformers import AutoProcessor

from tokprune.cli import app
from tokprune.errors import ChatTemplateError
from tokprune.inputs.places import split_places
from tokprune.inputs.prompts import prompt_text

QUESTION = "what is in the picture ?"
#: placeholders of the families, with and without the markers around them
PLACES = (
    "<image>", "<|image_pad|>", "<|vision_start|><|image_pad|><|vision_end|>", "<image_soft_token>",
    "<start_of_image>", "<start_of_image><image_soft_token><image_soft_token><end_of_image>",
    "[IMG]", "<IMG_CONTEXT>", "<img><IMG_CONTEXT><IMG_CONTEXT></img>", "<|image|>",
    "<|begin_of_image|><|image|><|end_of_image|>", "<|IMG_PATCH|>", "<image_placeholder>",
)  # fmt: skip
#: whole prompts of models of several families; ``{}``: places and question
WHOLE = (
    "USER: {} ASSISTANT:",
    "USER: {}\nASSISTANT:",
    "USER:{}",
    "### Human: {}### Assistant:",
    "<s>[INST] {} [/INST]",
    "[INST]{}[/INST]",
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    "<bos><start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n",
    "[gMASK]<sop><|user|>\n{}<|assistant|>\n",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "<|im_start|>User:{}<end_of_utterance>\nAssistant:",
    "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|>{}<|END_OF_TURN_TOKEN|>"
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
)


class Plain:
    """A processor without a chat template."""

    chat_template, image_token, video_token = None, "<image>", "<video>"


class Templated(Plain):
    """One whose template has a system text of its own, and none of the words that are known."""

    chat_template = "there is one"

    def apply_chat_template(self, messages: Any, add_generation_prompt: bool) -> str:
        assert add_generation_prompt
        said = "" if messages[0]["role"] == "system" else "(be kind) "
        for message in messages:
            words = {"image": "<image> ", "video": "<video> "}
            parts = [p.get("text") or words[p["type"]] for p in message["content"]]
            said += f"[{message['role']}] {''.join(parts)} [end] "
        return said + "[answer]"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("prompts")
    tiny_processor.save(root / "llava")
    tiny_processor.save(root / "plain", chat=False)
    landscape().save(root / "photo.png")
    return root


@pytest.mark.parametrize("processor", [Plain(), Templated()], ids=["plain", "template"])
@pytest.mark.parametrize("place", PLACES)
def test_any_placeholder_makes_the_prompt_of_the_bare_question(processor: Any, place: str) -> None:
    bare = prompt_text(processor, QUESTION)
    for form in ("{}\n{}", "{}{}", "{} {}", "\n{}\n\n{}\n"):
        assert prompt_text(processor, form.format(place, QUESTION).rstrip("\n")) == bare
    two = prompt_text(processor, QUESTION, 2)
    assert prompt_text(processor, f"{place}\n{place}\n{QUESTION}", 2) == two


@pytest.mark.parametrize("processor", [Plain(), Templated()], ids=["plain", "template"])
@pytest.mark.parametrize("whole", WHOLE)
def test_whole_prompts_of_any_model_make_the_prompt_of_the_bare_question(
    processor: Any, whole: str
) -> None:
    for lead, images in (("", 1), ("<image>\n", 1), ("", 0), ("<image>\n<|image_pad|>\n", 2)):
        bare = prompt_text(processor, QUESTION, images)
        assert prompt_text(processor, whole.format(lead + QUESTION), images) == bare
    own = prompt_text(processor, QUESTION)
    assert prompt_text(processor, own) == own
    assert prompt_text(processor, own.replace("<image>", "")) == own


def test_places_stand_where_the_prompt_has_them() -> None:
    made = prompt_text(Plain(), "is [IMG] or <|image_pad|> larger ?", 2)
    assert made == "USER: is <image> or <image> larger ? ASSISTANT:"
    older = prompt_text(Plain(), "<image>\nUSER: what ?\nASSISTANT:")
    assert older == prompt_text(Plain(), "what ?")
    assert split_places(Plain(), "what ?\n<image>") == [("text", "what ?"), ("image", "")]
    assert split_places(Plain(), "<image>\n<video>") == [("image", ""), ("video", "")]
    both = prompt_text(Plain(), "USER: <video> then <image> ? ASSISTANT:", 1, 1)
    assert both == "USER: <video>\nthen <image> ? ASSISTANT:"


def test_system_texts_and_earlier_turns_stay() -> None:
    chat = (
        "<|im_start|>system\nin French<|im_end|>\n<|im_start|>user\n<image>\nwhat ?<|im_end|>\n"
        "<|im_start|>assistant\na lake<|im_end|>\n<|im_start|>user\nhow many ?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert prompt_text(Templated(), chat) == (
        "[system] in French [end] [user] <image> what ? [end] [assistant] a lake [end] "
        "[user] how many ? [end] [answer]"
    )
    assert prompt_text(Plain(), chat) == (
        "in French USER: <image>\nwhat ? ASSISTANT: a lake USER: how many ? ASSISTANT:"
    )
    vicuna = "A chat. USER: <image>\nwhat ? ASSISTANT:"
    assert prompt_text(Plain(), vicuna) == "A chat. USER: <image>\nwhat ? ASSISTANT:"


@pytest.mark.parametrize(
    "question", ["Human: or robot ?", "is USER: bob ?", "[1, 2] or [INST] ?", "ASSISTANT: who ?"]
)
def test_questions_that_only_look_like_conversations(question: str) -> None:
    assert prompt_text(Plain(), question) == f"USER: <image>\n{question} ASSISTANT:"


@pytest.mark.parametrize(
    ("question", "images", "videos", "message"),
    [
        ("<image><image> what ?", 1, 0, r"has 2 place\(s\) for images, and there are 1"),
        ("<image> what ?", 2, 0, r"has 1 place\(s\) for images, and there are 2"),
        ("<|image_pad|> what ?", 0, 0, r"has 1 place\(s\) for images, and there are 0"),
        ("<video> what ?", 1, 0, r"has 0 place\(s\) for images, and there are 1"),
        ("<image><video> what ?", 1, 0, r"has 1 place\(s\) for videos, and there are 0"),
        ("USER: <image> what ? ASSISTANT:", 0, 0, r"has 1 place\(s\) for images, and there are 0"),
    ],
)
def test_counts_that_differ_are_named(
    question: str, images: int, videos: int, message: str
) -> None:
    for processor in (Plain(), Templated()):
        with pytest.raises(ValueError, match=message):
            prompt_text(processor, question, images, videos)


@pytest.mark.parametrize("family", family_processors.FAMILIES)
def test_own_prompts_of_the_families(family: str, tmp_path: Path) -> None:
    folder = family_processors.save(tmp_path / family, family)
    try:
        processor = AutoProcessor.from_pretrained(folder)
    except ImportError:
        from tokprune import load

        _, processor = load(folder, processor=True)
    bare = prompt_text(processor, QUESTION)
    assert prompt_text(processor, bare) == bare
    for place in PLACES:
        assert prompt_text(processor, f"{place}\n{QUESTION}") == bare, place
        assert prompt_text(processor, f"USER: {place}\n{QUESTION} ASSISTANT:") == bare, place


@pytest.mark.parametrize(
    "template",
    [
        "{% for %}", "{{ messages.foo.bar }}", "{{ raise_exception('no') }}", "{{ 1 / 0 }}",
        "{{ ''.__class__.__mro__ }}", "{% for i in range(99999999999) %}x{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{% include '/etc/passwd' %}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{{ messages[0]['role'] }}",
    ],
)  # fmt: skip
def test_broken_and_hostile_templates_are_named(home: Path, template: str) -> None:
    processor = AutoProcessor.from_pretrained(home / "llava")
    processor.chat_template = template
    with pytest.raises(ChatTemplateError, match=r"chat template .*llava"):
        prompt_text(processor, QUESTION)


@pytest.mark.parametrize("model", ["llava", "plain"])
def test_the_command_gives_the_same_answer(
    home: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = []
    for prompt in (QUESTION, f"<image>\n{QUESTION}", f"USER: <image>\n{QUESTION} ASSISTANT:"):
        with pytest.raises(SystemExit) as ended:
            app(["run", "--model", str(home / model), "--image", str(home / "photo.png"),
                 "--method", "divprune", "--keep", "9", "--max-new-tokens", "6", "--json",
                 "--prompt", prompt])  # fmt: skip
        out, err = capsys.readouterr()
        assert ended.value.code == 0, err
        answers.append(json.loads(out)["answer"])
    assert answers == answers[:1] * 3


def test_the_installed_command_names_the_option(home: Path) -> None:
    script = Path(sys.executable).with_name("tokprune")
    done = subprocess.run(
        [script, "run", "--model", home / "llava", "--prompt", "<image><image> what ?"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("Error: --prompt")
    assert "has 2 place(s) for images, and there are 0" in line
