"""Calibrates a schedule on your images, at no more cost than the default schedule.

What counts is how far a pruned model's next tokens are from the unpruned model's: the mean over the
tokens of the unpruned model's own greedy answer of KL(unpruned || pruned), in nats. The pruned
model prunes the prompt and is then led along that answer. No right answers are needed. Cf.
Depth-wise Operation Pruning (arXiv 2507.02909), which searches by the same measure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
import yaml
from torch import Tensor

from trio.benchmark.conditions import machine
from trio.benchmark.quality.sample import sample
from trio.benchmark.quality.search import Search, Space, most_answers
from trio.demo import SHARD
from trio.engine.decoding.generation_rules import FILE as DECODING_FILE
from trio.engine.decoding.teacher_forcing import Answer, Answers
from trio.engine.loading import load, load_outline
from trio.engine.metrics import choosing_flops
from trio.engine.preprocess import Preprocessor
from trio.engine.request import Prepared
from trio.errors import UserError
from trio.families.registry import adapt, register_adapters
from trio.job.command import DEFAULT_RETENTION, check_model
from trio.job.resume.fingerprint import model_directory
from trio.job.settings import DEMO, Settings
from trio.pruning.method_registry import chooses_before_decoder
from trio.pruning.options import Pruning
from trio.pruning.pruning_config import FILE as PRUNING_FILE
from trio.pruning.schedule import SCHEDULE_FILES, Schedule, ScheduleShape, tokens_per_layer
from trio.tables import aligned
from trio.version import VERSION

LEAST_ROWS = 8
RESAMPLES = 4000
"""Of the bootstrap."""


def resolved(config: Settings) -> Settings:
    """Settings with their defaults filled in.

    Raises:
        UserError: with these there is nothing to search for.
    """
    check_model(config.model.model)
    if config.pruning.schedule is not None:
        raise UserError("calibrate searches for a schedule: give --retention instead of one")
    config = config.replace(retention=config.pruning.retention or DEFAULT_RETENTION)
    method, retention = config.pruning.method, config.pruning.retention
    if chooses_before_decoder(method) or not config.pruning_asked:
        what = "--retention 1" if retention == 1.0 else f"--method {method}"
        raise UserError(f"{what}: its schedule has no shape that could be searched for")
    if method == "none":
        raise UserError("--method none chooses in the encoder alone: there is nothing to search")
    return config


def check_file(path: Path | None) -> Path:
    """Raise UserError unless a schedule file or a `pruning_config.json` can be written there."""
    if path is None or (path.suffix not in SCHEDULE_FILES and path.name != PRUNING_FILE):
        raise UserError(
            "--output: name the file to write, ending in .yaml, as in schedule.yaml, or a "
            f"checkpoint's {PRUNING_FILE}"
        )
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UserError(f"--output {path}: no file can be written there; name one in a directory")
    return path


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is to be done, told before it is."""

    config: Settings
    rows: int
    layers: int
    """Of the decoder."""
    pruning: Pruning
    """Settled."""
    default: Schedule
    """The schedule to beat."""

    @classmethod
    def of(cls, config: Settings, rows: int) -> Plan:
        """Weights are not loaded.

        Raises:
            UserError: no such model, or it cannot be pruned like that.
        """
        if rows < LEAST_ROWS:
            raise UserError(f"--rows {rows}: at least {LEAST_ROWS}, half of which are held out")
        register_adapters(config.model.adapters)
        model, _ = load_outline(_place(config), revision=config.model.revision)
        adapter = adapt(model)
        layers = adapter.shape().num_layers
        settled = adapter.settle(config.pruning)
        default = default_schedule(settled, layers)
        return cls(config=config, rows=rows, layers=layers, pruning=settled, default=default)

    @property
    def answers(self) -> int:
        searched = self.rows // 2
        return most_answers(searched) + 2 * (self.rows - searched)

    def __str__(self) -> str:
        config, pruning = self.config, self.config.pruning
        return (
            f"model {config.model.model}, {self.layers} layers; method {pruning.method}, encoder "
            f"{pruning.encoder}, retention {pruning.retention:.4g}\n"
            f"default schedule {self.default}\n"
            f"{self.rows} rows of {' '.join(config.input.input)}, seed {config.seed}: "
            f"{self.rows // 2} to search on, {self.rows - self.rows // 2} held out; one unpruned "
            f"answer to each and at most {self.answers} pruned ones"
        )


def default_schedule(settled: Pruning, layers: int) -> Schedule:
    """What a retention leads to without a calibration, as ratios."""
    assert settled.retention is not None
    shape = settled.schedule_shape
    assert isinstance(shape, ScheduleShape)
    return Schedule.of_shares(settled.retention, layers, shape.at_depth(layers))


def _place(config: Settings) -> str:
    return model_directory(config.model.model) or config.model.model


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Divergences [nats per token] on the rows that the search has not seen."""

    default: np.ndarray
    best: np.ndarray | None
    """None where the search found nothing better than the default."""
    seed: int

    @property
    def better(self) -> bool:
        """Whether the best is ahead of the default by more than its interval."""
        return self.best is not None and self.interval(self.best - self.default)[1] < 0

    def interval(self, values: np.ndarray) -> tuple[float, float]:
        """95 % interval of a mean over rows, by the bootstrap."""
        rng = np.random.default_rng(self.seed)
        means = values[rng.integers(len(values), size=(RESAMPLES, len(values)))].mean(1)
        low, high = np.percentile(means, (2.5, 97.5))
        return float(low), float(high)

    def told(self, values: np.ndarray) -> dict[str, Any]:
        """Mean and interval, for the file."""
        low, high = self.interval(values)
        return {"mean": _short(values.mean()), "interval": [_short(low), _short(high)]}


def _short(value: float) -> float:
    return float(f"{value:.4g}")


class Calibration:
    """A model with the rows to calibrate on, and what the unpruned model answers to them.

    Raises:
        UserError: too few rows can be asked.
    """

    def __init__(self, plan: Plan, tell: Callable[[str], None]) -> None:
        config = plan.config
        self.plan, self._tell, self._done = plan, tell, 0
        model, processor = load(
            _place(config),
            device=None,
            dtype=None if config.model.dtype == "auto" else config.model.dtype,
            revision=config.model.revision,
            min_pixels=config.model.min_pixels,
            max_pixels=config.model.max_pixels,
        )
        self.model = model
        self._answers = Answers(model, processor, max_new_tokens=config.sampling.max_new_tokens)
        if off := self._answers.rules_off:
            names = ", ".join(off)
            tell(f"{DECODING_FILE}: {names} off here: calibration follows raw greedy answers")
        self.adapter = self._answers.adapter
        self.pruning = self.adapter.settle(config.pruning)
        prepare = Preprocessor(processor, type(self.adapter), config.input.system_prompt)
        self.prompts, self.unpruned = self._ask(list(_prompts(config, plan.rows, prepare, tell)))
        self.searched = len(self.prompts) // 2

    def _ask(self, prompts: list[Prepared]) -> tuple[list[Prepared], dict[Any, Answer]]:
        """The prompts that can be served, and the unpruned model's answers in main memory."""
        there: dict[Any, Answer] = {}
        for name, answer in self._answers(Pruning(), prompts):
            if isinstance(answer, Answer):
                there[name] = replace(answer, logits_NV=answer.logits_NV.cpu())
            else:
                self._tell(f"a row is left out: {answer.error}")
        served = [prompt for prompt in prompts if prompt.id in there]
        if len(served) < LEAST_ROWS:
            raise UserError(
                f"only {len(served)} rows of the input can be asked, and at least {LEAST_ROWS} are "
                "needed; the lines above say what is wrong with others"
            )
        self._tell(f"{len(served)} unpruned answers")
        return served, there

    def search(self) -> Search:
        """The search on the first half of the rows."""
        plan = self.plan
        assert plan.config.pruning.retention is not None
        space = Space(
            default=plan.default,
            retention=plan.config.pruning.retention,
            num_layers=plan.layers,
            allowed=self.allowed,
            first=None if self.pruning.encoder == "none" else 0,
        )
        return Search(space, self.searched, self.divergences, seed=plan.config.seed)

    def compare(self, best: Schedule) -> Comparison:
        """The best schedule found beside the default, on the other half."""
        rows = range(self.searched, len(self.prompts))
        default = self.plan.default
        return Comparison(
            default=np.array(self.divergences(default, rows)),
            best=None if best == default else np.array(self.divergences(best, rows)),
            seed=self.plan.config.seed,
        )

    def divergences(self, schedule: Schedule, rows: range) -> list[float]:
        """Mean KL [nats per token] of each of these rows under a schedule."""
        prompts = self.prompts[rows.start : rows.stop]
        given = {prompt.id: self.unpruned[prompt.id].token_ids for prompt in prompts}
        found = {}
        for name, answer in self._answers(self._with(schedule), prompts, given):
            if not isinstance(answer, Answer):
                raise UserError(f"a row cannot be measured when pruned: {answer.error}")
            found[name] = divergence(self.unpruned[name].logits_NV, answer.logits_NV)
        self._done += len(prompts)
        mean = np.mean(list(found.values()))
        self._tell(f"{self._done}/{self.plan.answers} {_ratios(schedule)}: {mean:.4g}")
        return [found[prompt.id] for prompt in prompts]

    def _with(self, schedule: Schedule) -> Pruning:
        return replace(self.pruning, retention=None, schedule=schedule)

    def allowed(self, schedule: Schedule) -> bool:
        """Whether the model can be pruned like that, at no more FLOPs than the default's."""
        try:
            return self.flops(schedule) <= self._most_flops
        except UserError:
            return False

    @cached_property
    def _most_flops(self) -> float:
        return self.flops(self.plan.default)

    def flops(self, schedule: Schedule) -> float:
        """Of the decoder's prefill of a row, choosing included, on average over the rows."""
        pruning = self._with(schedule)
        total = sum(
            times * self._prompt_flops(pruning, images, text)
            for (images, text), times in self._sizes.items()
        )
        return total / len(self.prompts)

    @cached_property
    def _sizes(self) -> Counter[tuple[tuple[int, ...], int]]:
        """How many prompts have so many visual tokens in each image, and so many of text."""
        return Counter(
            (prompt.image_tokens, len(prompt.input_ids) - sum(prompt.image_tokens))
            for prompt in self.prompts
        )

    def _prompt_flops(self, pruning: Pruning, images: tuple[int, ...], text: int) -> int:
        shape = self.adapter.shape()
        layers = shape.num_layers
        present = [text] * layers
        for count in images:
            entering = pruning.encoded(count, layers)
            own = tokens_per_layer(entering, pruning.stages(count, layers), layers)
            present = [before + more for before, more in zip(present, own, strict=True)]
        return shape.prefill_flops(present) + choosing_flops(shape, pruning, images, text)


def _prompts(
    config: Settings, rows: int, prepare: Preprocessor, tell: Callable[[str], None]
) -> Iterator[Prepared]:
    """Rows of the input, prepared; says which cannot be."""
    paths = [str(SHARD.parent) if path == DEMO else path for path in config.input.input]
    requests, errors = sample(config, paths, rows)
    for error in errors:
        tell(f"a row is left out: {error}")
    for request in requests:
        prepared = prepare(request)
        if isinstance(prepared, Prepared):
            yield prepared
        else:
            tell(f"a row is left out: {prepared.error}")


def divergence(unpruned_NV: Tensor, pruned_NV: Tensor) -> float:
    """Mean over the N tokens of KL(unpruned || pruned), in nats, from logits."""
    like = F.log_softmax(unpruned_NV.to(pruned_NV.device).float(), dim=-1)
    found = F.log_softmax(pruned_NV.float(), dim=-1)
    return float(F.kl_div(found, like, log_target=True, reduction="sum")) / len(like)


def calibrate(plan: Plan, tell: Callable[[str], None]) -> dict[str, Any]:
    """Search, compare, and return what the file says.

    tell: is told of every step.
    """
    calibration = Calibration(plan, tell)
    search = calibration.search()
    best = search.best()
    comparison = calibration.compare(best)
    chosen = best if comparison.better else plan.default
    return report(calibration, search, comparison, best, chosen)


def report(
    calibration: Calibration,
    search: Search,
    comparison: Comparison,
    best: Schedule,
    chosen: Schedule,
) -> dict[str, Any]:
    """The content of a schedule file."""
    plan, config, pruning = calibration.plan, calibration.plan.config, calibration.pruning
    tried = {"default": (plan.default, comparison.default)}
    if comparison.best is not None:
        tried["searched"] = (best, comparison.best)
    rows = {
        name: {
            "schedule": _ratios(schedule),
            "prefill_flops": round(calibration.flops(schedule)),
            "search_mean": _short(search.mean(schedule)),
            **comparison.told(values),
        }
        for name, (schedule, values) in tried.items()
    }
    if comparison.best is not None:
        rows["difference"] = comparison.told(comparison.best - comparison.default)
    return {
        "schedule": _ratios(chosen),
        "layers": plan.layers,
        "chosen": "searched" if comparison.better else "default",
        "retention": config.pruning.retention,
        "model": config.model.model,
        "revision": config.model.revision,
        "method": pruning.method,
        "encoder": pruning.encoder,
        "proxy_positions": pruning.proxy_positions,
        "proxy_layer": pruning.proxy_layer,
        "proxy_head": pruning.proxy_head,
        "fill_up": pruning.fill_up,
        "position_ids": pruning.position_ids,
        "similarity_threshold": pruning.similarity_threshold,
        "max_new_tokens": config.sampling.max_new_tokens,
        "input": list(config.input.input),
        "seed": config.seed,
        "search_rows": calibration.searched,
        "held_out_rows": len(comparison.default),
        "schedules_tried": len(search.scores),
        "divergence": rows,
        "conditions": {"trio-vlm": VERSION, **machine(calibration.adapter.decoder.device)},
    }


def _ratios(schedule: Schedule) -> str:
    return str(replace(schedule, depth=None))


def dump(report: dict[str, Any]) -> str:
    """A schedule file's text."""
    head = (
        "# Written by jobs/benchmark.py calibrate; --schedule takes this file.\n"
        "# schedule: layer:share of the visual tokens of each image kept from there on.\n"
        "# divergence: nats per token of the answer on the held-out rows, with 95 % intervals;\n"
        "# search_mean is that on the rows of the search.\n"
    )
    return head + yaml.safe_dump(report, sort_keys=False, allow_unicode=True)


def table(report: dict[str, Any]) -> str:
    """The schedules side by side, as aligned text, and what follows."""
    lines = [["", "schedule", "MFLOPs", "search", "held out", "95 % interval"]]
    for name, row in report["divergence"].items():
        low, high = row["interval"]
        flops = f"{row['prefill_flops'] / 1e6:.1f}" if "prefill_flops" in row else ""
        searched = f"{row['search_mean']:.4g}" if "search_mean" in row else ""
        lines.append(
            [
                name,
                row.get("schedule", ""),
                flops,
                searched,
                f"{row['mean']:.4g}",
                f"{low:.4g} to {high:.4g}",
            ]
        )
    verdict = (
        "the searched schedule diverges less than the default by more than its interval"
        if report["chosen"] == "searched"
        else "nothing beats the default schedule by more than its interval on the held-out rows:"
        " the default is written"
    )
    return f"{aligned(lines)}\n{report['schedules_tried']} schedules tried; {verdict}"
