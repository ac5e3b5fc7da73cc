"""From a finished task to its result. Loads no torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from trio.engine.request import Result, failed
from trio.engine.sequence import Task
from trio.pruning.flops import DecoderShape, layer_average


def report(
    task: Task,
    *,
    shape: DecoderShape,
    bytes_per_element: int,
    decode: Callable[[Sequence[int]], str],
    beside: tuple[int, int] = (0, 0),
) -> Result:
    """The result of a task whose answer is complete, or which has failed on the device.

    `decode`: token ids to text. `beside`: FLOPs of reading the prompt that are not the decoder's,
    pruned and unpruned.
    """
    reason = task.finish_reason
    assert reason is not None
    if task.failure is not None:
        return _failed(task, task.failure)
    visual = task.visual_tokens
    text = task.prompt_tokens - visual
    # An answer's last token need not be stored: it is never fed back.
    added = len(task.token_ids) - 1
    unpruned = [task.prompt_tokens] * shape.num_layers
    present = [tokens - text for tokens in task.layer_tokens]
    flops, flops_unpruned = shape.prefill_flops(task.layer_tokens), shape.prefill_flops(unpruned)
    return Result(
        id=task.prepared.id,
        response=decode(task.token_ids[:-1] if reason == "stop" else task.token_ids),
        token_ids=task.token_ids,
        logprobs=task.logprobs,
        first_logprobs=task.first_logprobs,
        finish_reason=reason,
        prompt_tokens=task.prompt_tokens,
        output_tokens=len(task.token_ids),
        num_images=len(task.spans),
        visual_tokens=visual,
        visual_tokens_encoder=len(task.entered) or visual,
        visual_tokens_stages=[len(stage) for stage in task.kept],
        retention=layer_average(visual, present) if visual else None,
        prefill_flops=flops,
        prefill_flops_unpruned=flops_unpruned,
        reading_flops=flops + beside[0],
        reading_flops_unpruned=flops_unpruned + beside[1],
        kv_bytes=shape.kv_bytes([n + added for n in task.layer_tokens], bytes_per_element),
        kv_bytes_unpruned=shape.kv_bytes([n + added for n in unpruned], bytes_per_element),
        prefill_s=task.prefill_s,
        decode_s=task.decode_s,
        latency_s=time.perf_counter() - task.submitted,
        kept_tokens=[task.entered, *task.kept] if task.entered else task.kept,
    )


def _failed(task: Task, failure: str) -> Result:
    """With what is known of the prompt, and nothing of what came of it."""
    return replace(
        failed(task.prepared.id, "numeric", failure),
        prompt_tokens=task.prompt_tokens,
        num_images=len(task.spans),
        visual_tokens=task.visual_tokens,
        prefill_s=task.prefill_s,
        decode_s=task.decode_s,
        latency_s=time.perf_counter() - task.submitted,
    )
