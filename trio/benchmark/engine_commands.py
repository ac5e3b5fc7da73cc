"""`benchmark.py questions` and `launches`: what the engine shares, and what it asks of a GPU. What
measures is imported when it runs: no torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from trio.benchmark.commands import Count, Measurement, NewFile, line, tell, write
from trio.benchmark.speed_commands import Device, Dtype, device_and_dtype
from trio.pruning.options import Pruning
from trio.values import Seed, Shape, Tokens, Value, listed, whole

Layers = Annotated[tuple[int, ...], Value(read=listed(whole(0)), unit="LAYER,...")]


@dataclass(frozen=True, kw_only=True, slots=True)
class Questions(Measurement):
    """Several questions on each image: what sharing the layers before the first stage spares."""

    shape: Shape = "small"
    """As for speed."""
    images: Count = 16
    """Different ones."""
    questions: Count = 4
    """On each image."""
    prompt_tokens: Tokens = 20
    """Of the shortest question; the next ones have one more each."""
    output_tokens: Tokens = 4
    """Of each answer."""
    first_stage: Layers = (0, 1, 10)
    """Layers behind which one ninth of an image's tokens stay, one row each."""
    device: Device | None = None
    """Where to measure (default: the GPU if there is one)."""
    dtype: Dtype | None = None
    """Of the weights (default: float32; bfloat16 on a GPU)."""
    rounds: Count = 3
    """Each with both ways; medians are shown."""
    seed: Seed = 0
    """Of words and pixels."""
    json: NewFile | None = None
    """Also write conditions and rows as JSON."""

    def run(self) -> int:
        import torch

        from trio.benchmark.conditions import machine
        from trio.benchmark.speed.engine_speed import Workload
        from trio.benchmark.speed.questions_speed import Questions as Asked
        from trio.benchmark.speed.questions_speed import compare, table

        device, dtype = device_and_dtype(self.device, self.dtype)
        shown = ("shape", "images", "questions", "prompt_tokens", "output_tokens", "rounds", "seed")
        conditions: dict[str, Any] = {name: getattr(self, name) for name in shown}
        conditions |= {"dtype": dtype, **machine(device)}
        print(line(conditions), flush=True)
        tokens = (self.output_tokens, self.output_tokens)
        found = compare(
            self.shape,
            Workload(batch=self.images, prompt_tokens=1, output_tokens=tokens, seed=self.seed),
            Asked(each=self.questions, tokens=self.prompt_tokens),
            [Pruning(schedule=f"{layer}:{1 / 9:.4f}") for layer in self.first_stage],
            device=device,
            dtype=getattr(torch, dtype),
            rounds=self.rounds,
            tell=tell,
        )
        print(table(found))
        write(self.json, {"conditions": conditions, "rows": found})
        return 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Launches(Measurement):
    """Launches and host synchronisations of a prefill of LLaVA-NeXT-7B on a GPU, counted on a CPU:
    its layers, tokens and tiles, in a narrow model."""

    images: Count = 5
    """Of 672 x 672 pixels, in one prefill."""
    places: Count = 8
    """Lines of code that launch most, to be shown."""
    json: NewFile | None = None
    """Also write all counts as JSON."""

    def run(self) -> int:
        from trio.benchmark.speed.launches import compare, table

        found = compare(self.images, self.places, tell)
        print(table(found))
        write(self.json, {"conditions": {"images": self.images}, "rows": found})
        return 0
