"""A no-op engine, with which a job's time is that of the pipeline around it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trio.engine.kv_budget import MemoryPlan
from trio.engine.request import Prepared, Request, Result
from trio.job.engines.engine_settings import EngineSettings

VISUAL_TOKENS = 576
PROMPT_TOKENS = 600


class InstantEngine:
    """Prepares nothing, and answers all that it was given in its next step.

    Every answer is the same, with every figure that a real one has, so that the rows written are
    as wide as those of a real run.
    """

    def __init__(self) -> None:
        self._waiting: list[Prepared] = []

    @property
    def has_work(self) -> bool:
        return bool(self._waiting)

    @property
    def memory_plan(self) -> MemoryPlan:
        return MemoryPlan(
            kv_budget_bytes=1 << 30,
            max_running=64,
            request_bytes=1 << 20,
            request_bytes_unpruned=1 << 23,
        )

    def prepare(self, request: Request) -> Prepared:
        return Prepared(input_ids=(0,), id=request.id, sampling=request.sampling)

    def submit(self, prepared: Prepared) -> None:
        self._waiting.append(prepared)

    def step(self) -> list[Result]:
        waiting, self._waiting = self._waiting, []
        return [_answer(prepared.id) for prepared in waiting]

    def release(self, prepared: Prepared) -> None: ...

    def stats(self) -> Mapping[str, Any]:
        return {"encode_s": 0.0, "prefill_s": 0.0, "prune_s": 0.0, "decode_s": 0.0}


def instant_engines(settings: EngineSettings) -> list[InstantEngine]:
    """The factory that a job takes in place of the one for real engines."""
    return [InstantEngine() for _ in settings.engines]


def _answer(request_id: Any) -> Result:
    return Result(
        id=request_id,
        response="a red 7, a blue 3 and a green 5",
        token_ids=[1, 2, 3, 4],
        logprobs=[-0.1, -0.2, -0.3, -0.4],
        finish_reason="stop",
        prompt_tokens=PROMPT_TOKENS,
        output_tokens=4,
        num_images=1,
        visual_tokens=VISUAL_TOKENS,
        visual_tokens_encoder=VISUAL_TOKENS,
        visual_tokens_stages=[92, 54, 22],
        retention=1 / 9,
        prefill_flops=1e9,
        prefill_flops_unpruned=5e9,
        kv_bytes=1 << 20,
        kv_bytes_unpruned=5 << 20,
        prefill_s=0.0,
        decode_s=0.0,
        latency_s=0.0,
    )
