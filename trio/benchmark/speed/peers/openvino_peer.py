"""OpenVINO GenAI on a CPU, for `serve.py`; runs in an environment of its own, without this package.

The checkpoint is exported by `optimum-intel` first, which is no part of what is timed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

HINTS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


def _export(model: str, to: Path) -> None:
    """With weights as they are, which are else cut to 8 bits in larger models."""
    exporter = importlib.import_module("optimum.exporters.openvino")
    exact = importlib.import_module("optimum.intel").OVConfig(dtype="fp32")
    exporter.main_export(
        model, to, task="image-text-to-text", ov_config=exact, convert_tokenizer=True
    )


def load(task: dict[str, Any]) -> Callable[[list[dict[str, str]]], list[dict[str, Any]]]:
    """Its pipeline with continuous batching, in the task's dtype: float32 with keys and values in
    it, too, the others with those of 8 bits, as is its default on a CPU."""
    openvino = importlib.import_module("openvino")
    genai = importlib.import_module("openvino_genai")
    numpy = importlib.import_module("numpy")
    image_of = importlib.import_module("PIL.Image").open
    exported = Path(task["scratch"]) / "openvino"
    if not exported.exists():
        _export(task["model"], exported)
    options = {
        "INFERENCE_PRECISION_HINT": HINTS[task["dtype"]],
        "INFERENCE_NUM_THREADS": task["threads"],
    }
    if task["dtype"] == "float32":
        options["KV_CACHE_PRECISION"] = "f32"
    scheduling = genai.SchedulerConfig()
    scheduling.max_num_batched_tokens = 1024  # a tenth less work than with its 256
    pipeline = genai.ContinuousBatchingPipeline(str(exported), scheduling, "CPU", options)
    sampling = genai.GenerationConfig()
    sampling.max_new_tokens = task["output_tokens"]
    sampling.ignore_eos = True
    sampling.apply_chat_template = False

    def answer(requests: list[dict[str, str]]) -> list[dict[str, Any]]:
        images = [
            [openvino.Tensor(numpy.array(image_of(one["image"]).convert("RGB"))[None])]
            for one in requests
        ]
        # Behind each image of a LLaVA it writes a line break of its own.
        prompts = [one["rendered"].replace("<image>\n", "<image>") for one in requests]
        outputs = pipeline.generate(
            prompts, images=images, generation_config=[sampling] * len(requests)
        )
        counted = outputs[0].perf_metrics  # of the whole batch
        return [
            {
                "prompt_tokens": counted.get_num_input_tokens(),
                "output_tokens": counted.get_num_generated_tokens() // len(outputs),
                "text": one.texts[0],
            }
            for one in outputs
        ]

    return answer
