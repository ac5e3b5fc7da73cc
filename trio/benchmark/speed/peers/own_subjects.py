"""Our subjects, for `serve.py`: transformers' `generate`, our engine, and our engine pruned."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image

from trio.engine.engine import Engine
from trio.engine.loading import load as load_model
from trio.engine.request import Request, Sampling
from trio.pruning.options import Pruning

Asked = Sequence[dict[str, str]]
Answers = list[dict[str, Any]]


def load(task: dict[str, Any]) -> Callable[[Asked], Answers]:
    """What answers: `generate` where the task has no retention; 1 is unpruned."""
    torch.set_num_threads(task["threads"])
    if task["retention"] is None:
        return Generating(task)
    pruning = Pruning() if task["retention"] == 1 else Pruning(retention=task["retention"])
    engine = Engine.from_pretrained(
        task["model"],
        device="cpu",
        dtype=task["dtype"],
        pruning=pruning,
        max_running=task["images"],
    )
    sampling = Sampling(max_new_tokens=task["output_tokens"], ignore_eos=True)

    def answer(requests: Asked) -> Answers:
        asked = [
            Request(id=place, prompt=one["prompt"], images=(_image(one),), sampling=sampling)
            for place, one in enumerate(requests)
        ]
        results = sorted(engine.generate(asked), key=lambda result: result.id)
        for result in results:
            if result.error:
                raise RuntimeError(result.error)
        return [
            {
                "prompt_tokens": result.prompt_tokens,
                "output_tokens": len(result.token_ids),
                "text": result.response,
            }
            for result in results
        ]

    return answer


class Generating:
    """`generate` in batches, of the size that is the fastest for the first requests: one, all of
    them, a quarter, a sixteenth."""

    def __init__(self, task: dict[str, Any]) -> None:
        self._model, self._processor = load_model(task["model"], device="cpu", dtype=task["dtype"])
        self._model.generation_config.eos_token_id = None  # all answers are of one length
        self._tokens = task["output_tokens"]
        self._size: int | None = None

    def __call__(self, requests: Asked) -> Answers:
        if self._size is None:
            sizes = sorted({max(1, len(requests) // part) for part in (1, 4, 16, len(requests))})
            self._batch(requests[:1])  # whatever comes first is slow
            self._size = min(sizes, key=lambda size: self._seconds(requests[:size]) / size)
        size = self._size
        starts = range(0, len(requests), size)
        return [one for start in starts for one in self._batch(requests[start : start + size])]

    def _seconds(self, requests: Asked) -> float:
        began = time.perf_counter()
        self._batch(requests)
        return time.perf_counter() - began

    @torch.inference_mode()
    def _batch(self, requests: Asked) -> Answers:
        inputs = self._processor(
            text=[one["rendered"] for one in requests],
            images=[[_image(one)] for one in requests],
            padding=True,
            return_tensors="pt",
        )
        inputs = inputs.to(dtype=self._model.dtype)
        output = self._model.generate(**inputs, do_sample=False, max_new_tokens=self._tokens)
        answers = output[:, inputs["input_ids"].shape[1] :]
        texts = self._processor.batch_decode(answers, skip_special_tokens=True)
        lengths = inputs["attention_mask"].sum(1).tolist()
        return [
            {"prompt_tokens": length, "output_tokens": len(ids), "text": text}
            for length, ids, text in zip(lengths, answers, texts, strict=True)
        ]


def _image(request: dict[str, str]) -> Image.Image:
    return Image.open(request["image"]).convert("RGB")
