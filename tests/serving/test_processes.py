"""Several processes: the server over HTTP, and a model whose heads are shared between two."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from serving_case import ARCHITECTURE, LONGEST, MEMORY, questions, reference

from tokprune.models import resolve

pytestmark = pytest.mark.slow

DIVPRUNE = {"method": "divprune", "keep": 64}
#: until a server answers, in seconds
PATIENCE = 400


def environment(**more: str) -> dict[str, str]:
    """As vLLM has it by itself: engine and workers in processes of their own."""
    own = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    here = str(Path(__file__).parent)
    path = [here, str(Path(here).parent), *filter(None, [own.get("PYTHONPATH")])]
    return {**own, "PYTHONPATH": os.pathsep.join(path), **more}


def post(port: int, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )  # fmt: skip
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)  # type: ignore[no-any-return]


def chat(question: str, image: Image.Image | None, **more: Any) -> dict[str, Any]:
    content: list[dict[str, Any]] = []
    if image is not None:
        file = io.BytesIO()
        image.save(file, "PNG")
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        content.append({"type": "image_url", "image_url": {"url": url}})
    content.append({"type": "text", "text": question})
    return {
        "model": "mini", "messages": [{"role": "user", "content": content}], "temperature": 0,
        "max_tokens": LONGEST, "add_special_tokens": True, **more,
    }  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Port of a server on the loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    overrides = {"architectures": [ARCHITECTURE], "tokprune": {**DIVPRUNE, "max_keep": 144}}
    log = (tmp_path_factory.mktemp("server") / "log").open("w+")
    process = subprocess.Popen(
        [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", resolve("mini"),
         "--served-model-name", "mini", "--hf-overrides", json.dumps(overrides), "--dtype",
         "float32", "--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "8",
         "--block-size", "32", "--host", "127.0.0.1", "--port", str(port),
         "--kv-cache-memory-bytes", str(MEMORY), "--trust-request-mm-kwargs"],
        env=environment(), stdout=log, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        for _ in range(PATIENCE):
            assert process.poll() is None, Path(log.name).read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                time.sleep(1)
        yield port
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def text_of(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["message"]["content"]).strip()


def test_answers_over_http(server: int) -> None:
    asked = [chat(question, image) for question, _, image in questions()]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda body: post(server, body), asked))
    want = reference(json.dumps(DIVPRUNE))
    assert [text_of(own) for own in got] == [own.text for own in want]
    for own, other in zip(got, want):
        assert abs(own["usage"]["prompt_tokens"] - other.prompt) <= 2  # blanks of the template


def test_keep_of_a_request_over_http(server: int) -> None:
    question, _, image = questions()[0]
    lengths = []
    for keep in (None, 16, 144):
        more = {} if keep is None else {"mm_processor_kwargs": {"tokprune": {"keep": keep}}}
        lengths.append(post(server, chat(question, image, **more))["usage"]["prompt_tokens"])
    assert [n - lengths[0] for n in lengths] == [0, 16 - 64, 144 - 64]
    assert post(server, chat(question, None))["usage"]["prompt_tokens"] < 20
    for keep in (145, 0, "x"):
        bad = chat(question, image, mm_processor_kwargs={"tokprune": {"keep": keep}})
        with pytest.raises(urllib.error.HTTPError) as caught:
            post(server, bad)
        assert caught.value.code == 400
        assert "keep" in caught.value.read().decode()
    assert post(server, chat(question, image))["usage"]["prompt_tokens"] == lengths[0]


_SCRIPT = """
import json, sys
from serving_case import ask, engine, questions, request
if __name__ == "__main__":
    llm = engine(sys.argv[1], tensor_parallel_size=2, distributed_executor_backend="mp")
    got = ask(llm, [request(question, image) for question, _, image in questions()])
    print("ANSWERS", json.dumps([own.text for own in got]))
"""


def test_heads_shared_between_two_processes(tmp_path: Path) -> None:
    """Every one has some of the tower's heads, and both must keep the same tokens."""
    text = json.dumps({"method": "visionzip", "keep": 64})
    script = tmp_path / "two.py"
    script.write_text(_SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), text], capture_output=True, text=True, timeout=PATIENCE,
        env=environment(VLLM_CPU_OMP_THREADS_BIND="0|1"),
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS ")]
    assert lines, done.stderr[-3000:]
    want = [own.text for own in reference(text)]
    assert json.loads(lines[0].removeprefix("ANSWERS ")) == want
