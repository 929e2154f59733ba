#!/usr/bin/env python3
"""What pruning saves in vLLM: throughput and time to the first token, with it and without.

    python3 scripts/dev.py shell --environment vllm -- python scripts/bench_vllm.py
    python scripts/bench_vllm.py --model llava-hf/llava-1.5-7b-hf --method divprune --keep 64 \\
        --dtype bfloat16 --concurrency 1,8,32 --json vllm.json       # where vLLM is installed
    python scripts/bench_vllm.py --random 32x4096 --dtype bfloat16   # LLaVA-1.5-7B's shape

Two engines in turn, round by round, are given as many requests at once as the concurrency says;
every request shows a new image, and caches are off. On a CPU engines run in this process, so that
its CPU seconds count, which say more than the clock of a machine that is shared; elsewhere the
clock counts. Medians of the rounds; the first of each is left out.

Exit code: 1 if answers came back with the wrong number of tokens, else 0.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mini", help="folder or name of the checkpoint")
    parser.add_argument("--method", default="divprune")
    parser.add_argument("--keep", type=float, default=64, help="tokens, or below 1 a fraction")
    parser.add_argument("--concurrency", default="1,8,32", help="requests at once")
    parser.add_argument("--rounds", type=int, default=3, help="of each engine, after a first one")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--size", type=int, default=336, help="of the images, in pixels")
    parser.add_argument("--prompt", default="USER: <image>\nwhat is this? ASSISTANT:")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument(
        "--random", metavar="LAYERSxWIDTH", type=shape,
        help="random weights: a LLaMA of this shape behind CLIP-L's, in place of the checkpoint's",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="where results go as well")
    return parser.parse_args()


def shape(words: str) -> dict[str, Any]:
    """``--hf-overrides`` that make a model of this shape out of the embedded one, whose images have
    576 patches like LLaVA-1.5's."""
    layers, width = map(int, words.split("x"))
    heads = max(1, width // 128)
    text = {
        "num_hidden_layers": layers, "hidden_size": width, "intermediate_size": width * 43 // 16,
        "num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": width // heads,
    }  # fmt: skip
    vision = {
        "num_hidden_layers": 24, "hidden_size": 1024, "intermediate_size": 4096,
        "num_attention_heads": 16, "projection_dim": 768,
    }  # fmt: skip
    return {"text_config": text, "vision_config": vision}


@dataclass
class Round:
    """One round of an engine: seconds by the clock and of this process's CPU, and to the first
    token of a request (median; None where vLLM does not tell)."""

    wall: float
    cpu: float
    first: float | None
    prompt: int


def images(number: int, size: int, seed: int) -> list[Any]:
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (number, 12, 12, 3), dtype="uint8")
    return [Image.fromarray(own).resize((size, size)) for own in coarse]


def run(llm: Any, given: argparse.Namespace, number: int, seed: int) -> Round:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=given.new_tokens, ignore_eos=True)
    requests = [
        {"prompt": given.prompt, "multi_modal_data": {"image": image}}
        for image in images(number, given.size, seed)
    ]
    wall, cpu = time.perf_counter(), time.process_time()
    out = llm.generate(requests, sampling, use_tqdm=False)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    first = [getattr(own.metrics, "first_token_latency", None) for own in out if own.metrics]
    known = [value for value in first if value]
    return Round(wall, cpu, statistics.median(known) if known else None,
                 len(out[0].prompt_token_ids))  # fmt: skip


def main() -> int:
    given = options()
    import torch

    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")
    from vllm import LLM

    from tokprune.models import resolve
    from tokprune.vllm import overrides

    keep = int(given.keep) if given.keep >= 1 else given.keep
    counts = [int(word) for word in given.concurrency.split(",")]
    more: dict[str, Any] = (
        {"gpu_memory_utilization": 0.42}
        if on_gpu
        else {"enforce_eager": True, "distributed_executor_backend": "uni"}
    )
    engines = {
        name: LLM(
            resolve(given.model), dtype=given.dtype, max_model_len=given.max_model_len,
            max_num_seqs=max(counts), enable_prefix_caching=False, mm_processor_cache_gb=0,
            disable_log_stats=False, hf_overrides={**own, **(given.random or {})},
            load_format="dummy" if given.random else "auto", **more,
        )
        for name, own in (
            ("pruned", overrides(given.model, given.method, keep=keep)), ("whole", {}),
        )
    }  # fmt: skip
    results: dict[str, Any] = {
        "setting": {"method": given.method, "keep": keep}, "random": given.random, "rows": []
    }  # fmt: skip
    unit = "wall" if on_gpu else "cpu"
    fine = True
    for number in counts:
        rounds: dict[str, list[Round]] = {name: [] for name in engines}
        for turn in range(given.rounds + 1):
            for name, llm in engines.items():
                rounds[name].append(run(llm, given, number, 1000 * number + turn))
        cost = {
            n: statistics.median(getattr(r, unit) for r in own[1:]) for n, own in rounds.items()
        }
        first = {
            n: statistics.median(r.first or float("nan") for r in own[1:])
            for n, own in rounds.items()
        }
        ratio = cost["whole"] / cost["pruned"]
        fine &= rounds["pruned"][0].prompt < rounds["whole"][0].prompt
        print(
            f"{number:3} at once: {number / cost['whole']:7.2f} → {number / cost['pruned']:7.2f} "
            f"requests per second ({unit}), {ratio:.2f} ×; first token after "
            f"{1000 * first['whole']:.0f} → {1000 * first['pruned']:.0f} ms; prompt of "
            f"{rounds['whole'][0].prompt} → {rounds['pruned'][0].prompt} tokens",
            flush=True,
        )
        results["rows"].append(
            {"concurrency": number, "unit": unit, "ratio": ratio,
             **{n: [asdict(r) for r in own] for n, own in rounds.items()}}
        )  # fmt: skip
    if given.json is not None:
        given.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
