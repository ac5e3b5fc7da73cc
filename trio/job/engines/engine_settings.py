"""How an actor makes its engine, and how a task on a CPU makes the model's preprocessor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

from trio import openmp
from trio.engine.kv_budget import MemoryPlan
from trio.engine.request import Prepared, Request, Result, Sampling
from trio.job.nodes.cpus import usable
from trio.pruning.options import Pruning

if TYPE_CHECKING:
    from trio.engine.preprocess import Preprocessor


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSettings:
    """What a worker is told about its engine."""

    model: str
    """Hub id, directory, or "demo"."""
    prunings: tuple[Pruning, ...]
    """Of each setting that rows are asked with."""
    text_tower: str | None
    """Of the model's encoder: hub id, directory, or "demo"; None where no method needs it."""
    text_tower_revision: str | None
    """Commit of a hub id."""
    sampling: Sampling
    dtype: str | None
    """None: the engine's default."""
    batch_tokens: int | None
    max_running: int | None
    gpu_share: float
    """Of one GPU, at most 1; 0: on the CPU."""
    engines_per_node: int
    """That share a node's CPUs."""
    ahead: int
    """Rows that are prepared or in the engine at a time."""
    revision: str | None = None
    """Commit of a hub id."""
    min_pixels: int | None = None
    max_pixels: int | None = None
    """Of an image after resizing; None: the processor's own limits."""
    system: str | None = None
    """Message of all requests; None: the chat template's own."""
    adapters: tuple[str, ...] = ()
    """Families to register, "model_type=module:Class"."""
    audit: Pruning | None = None
    """Of an engine that some rows are asked with beside the first setting's."""

    @property
    def engines(self) -> tuple[Pruning, ...]:
        """Of each engine that the worker makes, on one model: settings first."""
        return self.prunings if self.audit is None else (*self.prunings, self.audit)

    @property
    def gpu(self) -> bool:
        return self.gpu_share > 0


class EngineLike(Protocol):
    """What the job needs of ``trio.Engine``."""

    @property
    def has_work(self) -> bool: ...
    @property
    def memory_plan(self) -> MemoryPlan: ...
    def prepare(self, request: Request) -> Prepared | Result: ...
    def submit(self, prepared: Prepared) -> None: ...
    def step(self) -> list[Result]: ...
    def stats(self) -> Mapping[str, Any]: ...
    def release(self, prepared: Prepared) -> None: ...


class PreprocessorLike(Protocol):
    """What the job needs of ``trio.engine.preprocess.Preprocessor``."""

    @property
    def cut(self) -> bool: ...
    def process(self, images: Sequence[Any]) -> Sequence[Any]: ...


AUDIT_SHARE = 0.25
"""Of the memory for keys and values: an audit has few rows at a time, and no hurry."""
EngineFactory = Callable[[EngineSettings], Sequence[EngineLike]]
"""Makes an engine for each of `EngineSettings.engines`."""
PreprocessorFactory = Callable[[EngineSettings], PreprocessorLike]


def build_engines(settings: EngineSettings) -> Sequence[EngineLike]:
    """The engines on this process's device."""
    # A Ray that was started by other hands need not have it in its environment.
    openmp.passively()
    import torch

    from trio.engine.engine import Engine

    if not settings.gpu:
        torch.set_num_threads(engine_threads(settings))
    _register_families(settings)
    first = Engine.from_pretrained(
        settings.model,
        text_tower=settings.text_tower,
        text_tower_revision=settings.text_tower_revision,
        pruning=settings.prunings[0],
        device="cuda" if settings.gpu else "cpu",
        dtype=getattr(torch, settings.dtype) if settings.dtype else None,
        sampling=settings.sampling,
        batch_tokens=settings.batch_tokens,
        max_running=settings.max_running,
        memory_share=settings.gpu_share,
        revision=settings.revision,
        min_pixels=settings.min_pixels,
        max_pixels=settings.max_pixels,
        system=settings.system,
    )
    if settings.audit is not None:  # of few rows, for which no features are to be held
        return first.beside([settings.audit], share=AUDIT_SHARE, encoding=False)
    return first.beside(settings.prunings[1:])


def build_preprocessor(settings: EngineSettings) -> Preprocessor:
    """The model's preprocessor, without its weights."""
    _register_families(settings)
    limits = settings.min_pixels, settings.max_pixels
    return _preprocessor(settings.model, settings.revision, limits, settings.system)


@lru_cache(maxsize=1)
def _preprocessor(
    model: str,
    revision: str | None,
    limits: tuple[int | None, int | None],
    system: str | None,
) -> Preprocessor:
    """Made once in a process, which may serve several runs."""
    openmp.passively()
    import torch

    from trio.engine.loading import load_preprocessor

    torch.set_num_threads(1)
    least, most = limits
    return load_preprocessor(
        model, revision=revision, min_pixels=least, max_pixels=most, system=system
    )


def _register_families(settings: EngineSettings) -> None:
    from trio.families.registry import register_adapters

    register_adapters(settings.adapters)


def engine_threads(settings: EngineSettings) -> int:
    """Threads that compute where an engine is on a CPU.

    Of many cores one is left to preparation and Ray, since a parallel region waits for its last
    thread; of two that would be half of them for a twentieth of the work.
    """
    share = usable() // settings.engines_per_node
    return max(1, share if share <= 2 else share - 1)
