"""Answers kept and cost, by pruning setting.

Every setting answers the same requests: for each held-out scene its caption, and for every second
one a question, the kinds in turn. A setting's accuracy is the share of exact answers, with a 95 %
Wilson interval; what it keeps is its right answers over those of the unpruned model, with a 95 %
interval by bootstrap over scenes. Captions are also scored by the share of objects named rightly.

Milliseconds per image are those of one request about one image that nobody has read before: the
encoder's (median over passes of several images, measured where the images are really encoded; the
settings after that share its features), and the setting's own prefill, pruning included, and
decoding, divided by the requests. Of them the method's own share is the time of choosing over the
time of encoder and prefill, where choosing in the encoder is what a reducing pass takes longer than
a plain one right behind it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from trio.benchmark.quality.agreement import Agreement
from trio.benchmark.quality.fill_up import FillUp, counting
from trio.benchmark.quality.quality_table import FROM_START
from trio.benchmark.speed.encoding_speed import EncodedOnce
from trio.demo.scenes import KINDS, make_scene
from trio.demo.shard import asked_of, rotation
from trio.engine.engine import Engine
from trio.engine.metrics import choosing_flops, encoder_flops
from trio.engine.preprocess import Preprocessor
from trio.engine.request import Prepared, Request, Result, Sampling
from trio.errors import UserError
from trio.families.adapter import Adapter
from trio.families.registry import adapt
from trio.families.text_tower import TextTower
from trio.job.output.scoring import exact_match, object_share
from trio.pruning.method_registry import chooses_before_decoder, needs_of
from trio.pruning.options import Pruning
from trio.pruning.schedule import PUBLISHED_AFTER_ENCODER, shape_of
from trio.vqa.intervals import ClusteredBootstrap, wilson_interval

MAX_NEW_TOKENS = 32
COUNTED = 200
"""Requests, at least, on which is counted what the fill-up keeps, if there are as many."""
BATCH_TOKENS, MAX_RUNNING = 8192, 256
"""Of the engine: on a CPU less at a time stays in its cache, and more rows decode together."""
PROXY_METHODS = ("gradient", "trio")
"""Methods that look at a proxy's loss, so that its settings matter."""
USUAL_PROXY = ("next", "output", "mixed")
"""Layer and head of a proxy, and what fills up, that a label does not name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """One request with its right answer and the number of its scene."""

    request: Request
    kind: str
    answer: str
    scene: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One row of the table: what to prune and how."""

    label: str
    pruning: Pruning


@dataclass(frozen=True, kw_only=True, slots=True)
class Flops:
    """Of reading one prompt, one for each multiplication with addition: the decoder's layers, the
    vision encoder, and scoring and choosing tokens."""

    decoder: float
    encoder: float
    choosing: float

    @property
    def total(self) -> float:
        return self.decoder + self.encoder + self.choosing


def settings(
    methods: Sequence[str],
    retentions: Sequence[float],
    encoders: Sequence[str],
    proxies: Sequence[Mapping[str, Any]],
    position_ids: Sequence[str | None],
    seed: int,
    shapes: Sequence[str | None] = (None,),
) -> list[Setting]:
    """The unpruned model first, then every method after every encoder at every retention; methods
    without a proxy appear once per position handling, and trio also as published.

    Labels name what is tried in more than one way.

    Args:
        proxies: settings of the proxy to try, by their names in `Pruning`.
        seed: of random pruning.
        shapes: as `Pruning.schedule_shape`, for methods that choose in the decoder without an
            encoder before it; None is the checkpoint's.

    Raises:
        UserError: a name that `Pruning` does not know.
    """
    rows = [Setting(label="none", pruning=Pruning(method="none", retention=1.0, seed=seed))]
    for retention, encoder, method in product(retentions, encoders, methods):
        if method == encoder == "none":
            continue
        common = Pruning(method=method, encoder=encoder, retention=retention, seed=seed)
        has_proxy = method in PROXY_METHODS
        for handling, proxy in product(position_ids, _of_method(method, proxies)):
            pruning = replace(common, position_ids=handling, **proxy)
            words = [pruning.name]
            if has_proxy and len(proxies) > 1:
                parts = (pruning.proxy_layer, pruning.proxy_head, pruning.fill_up)
                words.append(pruning.proxy_positions)
                words += [part for part in parts if part not in USUAL_PROXY]
            if len(position_ids) > 1 and handling:
                words.append(handling)
            own = shapes if encoder == "none" and not chooses_before_decoder(method) else [None]
            for shape in own:
                label = " ".join([*words, *_shape_name(shape)])
                rows.append(Setting(label=label, pruning=replace(pruning, schedule_shape=shape)))
        usual = list(shapes) == [None] and method == "trio"
        if usual and (encoder == "none" or math.isclose(retention, 1 / 9)):
            # Behind an encoder it is published for one ninth alone.
            rows.append(_published(common))
    return rows


def _shape_name(shape: str | None) -> list[str]:
    """What of a shape stands in a label."""
    if shape is None:
        return []
    return [FROM_START.strip()] if shape == "start" else [shape]


def _of_method(method: str, proxies: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The settings that matter to a method, each once, without those that are left open."""
    if method not in PROXY_METHODS:
        return [{}]
    ignored = {"fill_up"} if method == "gradient" else set()
    own = [
        {name: one for name, one in proxy.items() if name not in ignored and one is not None}
        for proxy in proxies
    ]
    return [proxy for place, proxy in enumerate(own) if proxy not in own[:place]]


def _published(pruning: Pruning) -> Setting:
    """TRIO as its authors run it, but for the numbers of tokens."""
    shape = "family" if pruning.encoder == "none" else PUBLISHED_AFTER_ENCODER
    published = replace(
        pruning, proxy_positions="reference", fill_up="reference", schedule_shape=shape
    )
    return Setting(label=f"{pruning.name} as published", pruning=published)


def in_reach(
    adapter: Adapter, rows: Sequence[Setting], *, has_text_tower: bool
) -> tuple[list[Setting], list[dict[str, Any]]]:
    """Those of the settings that this model can have, and the others with the reasons.

    A retention that is out of reach of the usual schedule is tried with its first stage at layer 0,
    before which no layer has all tokens; the label says so.

    One that comes to the same as an earlier one is left out as well.

    Raises:
        UserError: of several none is left beside the unpruned model.
    """
    there: list[Setting] = []
    left_out: list[dict[str, Any]] = []
    for row in rows:
        try:
            if "text_tower" in needs_of(row.pruning) and not has_text_tower:
                raise UserError(f"method {row.pruning.method} needs --text-tower")
            found = _settled(adapter, row)
            _check_new(adapter, found, there)
            there.append(found)
        except UserError as error:
            retention = row.pruning.retention
            left_out.append({"label": row.label, "retention": retention, "reason": str(error)})
    if left_out and len(there) == 1:
        raise UserError(f"{left_out[0]['label']}: {left_out[0]['reason']}")
    return there, left_out


def _check_new(adapter: Adapter, row: Setting, earlier: Sequence[Setting]) -> None:
    """Raise UserError where an earlier setting does just the same on this model."""
    own = adapter.settle(row.pruning)
    for other in earlier:
        if adapter.settle(other.pruning) == own:
            raise UserError(f"same as {other.label}")


def _settled(adapter: Adapter, row: Setting) -> Setting:
    """The setting, from layer 0 where it is out of reach otherwise."""
    try:
        adapter.settle(row.pruning)
    except UserError:
        shape = shape_of(row.pruning.schedule_shape, adapter.schedule_shape).from_start()
        pruning = replace(row.pruning, schedule_shape=shape)
        adapter.settle(pruning)
        return Setting(label=row.label + FROM_START, pruning=pruning)
    return row


def check_scenes(scenes: int, seeds: Sequence[int]) -> None:
    """Raise UserError unless scenes can be drawn so."""
    if scenes < 1:
        raise UserError(f"--scenes is {scenes}; it must be at least 1")
    if min(seeds) < 0 or len(set(seeds)) < len(seeds):
        shown = ",".join(map(str, seeds))
        raise UserError(f"--seed is {shown}; each must be at least 0 and come once")


def ask(scenes: int, seeds: Sequence[int], *, every: bool = False) -> list[Asked]:
    """The requests: a caption of each of `scenes` held-out scenes of each seed, and a question
    about every second one, or about every one. Questions are fewer by default, as they vary less
    from method to method."""
    asked: list[Asked] = []
    for place, seed in enumerate(seeds):
        rng = np.random.default_rng(seed)
        for number in range(scenes):
            scene = make_scene(rng, "heldout")
            image = scene.image
            kinds = rotation(number, 2) if every else rotation(number // 2, 2 - number % 2)
            for question in asked_of(rng, scene, kinds):
                asked.append(
                    Asked(
                        request=Request(id=len(asked), prompt=question.prompt, images=(image,)),
                        kind=question.kind,
                        answer=question.answer,
                        scene=place * scenes + number,
                    )
                )
    return asked


def measure(
    model: Any,
    processor: Any,
    asked: Sequence[Asked],
    rows: Sequence[Setting],
    *,
    seed: int,
    text_tower: TextTower | None = None,
) -> Iterator[dict[str, Any]]:
    """What each setting reports, in the order in which features can be shared.

    Args:
        rows: all within reach of the model, the first one being that to which the others are held.
        seed: of the bootstrap.
        text_tower: for methods that need it.

    Yields:
        One object per setting; `number` is its place among `rows`.
    """
    trial = _Trial(model, processor, asked, text_tower)
    unpruned = trial.run(rows[0].pruning)
    compare = _Comparison(trial.adapter, asked, trial.requests, unpruned, seed)
    yield {"number": 0, **compare.summary(rows[0], unpruned)}
    for number in sorted(range(1, len(rows)), key=lambda at: trial.reads(rows[at].pruning)):
        yield {"number": number, **compare.summary(rows[number], trial.run(rows[number].pruning))}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """One setting's answers in the order of the requests; times are seconds per request."""

    pruning: Pruning
    text_tower: TextTower | None
    results: list[Result]
    encode_s: float
    reduce_s: float
    prefill_s: float
    prune_s: float
    decode_s: float
    filled: FillUp | None


class _Trial:
    """Requests, prepared and encoded once, and the model that answers them."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        asked: Sequence[Asked],
        text_tower: TextTower | None,
    ) -> None:
        self.adapter = adapt(model)
        self.requests = _prepared(Preprocessor(processor, type(self.adapter)), asked)
        self._model, self._processor, self._text_tower = model, processor, text_tower
        self._images = {id(one.image_inputs[0]): one for one in self.requests}.values()
        self._encoded = EncodedOnce(
            self.adapter, text_tower.project if text_tower else None, hold=True
        )
        self._encoded_as: tuple[str, int] | None = None
        self._encode_s = self._reduce_s = 0.0

    def run(self, pruning: Pruning) -> _Run:
        pruning = self.adapter.settle(pruning)
        self._encode(pruning)
        engine = Engine(
            self._model,
            self._processor,
            pruning=pruning,
            sampling=Sampling(max_new_tokens=MAX_NEW_TOKENS, first_logprobs=True),
            batch_tokens=BATCH_TOKENS,
            max_running=MAX_RUNNING,
            encoder=self._encoded,
            text_tower=self._text_tower,
        )
        with engine:
            results = _answers(engine, self.requests)
        counted, count = engine.stats(), len(results)
        return _Run(
            pruning=pruning,
            text_tower=self._text_tower if "text_tower" in needs_of(pruning) else None,
            results=results,
            encode_s=self._encode_s,
            reduce_s=self._reduce_s,
            prefill_s=counted["prefill_s"] / count,
            prune_s=counted["prune_s"] / count,
            decode_s=counted["decode_s"] / count,
            filled=self._filled(pruning),
        )

    def _filled(self, pruning: Pruning) -> FillUp | None:
        """How many of the kept tokens the fill-up of method trio chose, in a run of its own, so
        that counting is in no time."""
        if pruning.method != "trio" or pruning.encoder != "none":
            return None
        some = self.requests[:: max(1, len(self.requests) // COUNTED)]
        engine = Engine(
            self._model,
            self._processor,
            pruning=pruning,
            sampling=Sampling(max_new_tokens=1),
            batch_tokens=BATCH_TOKENS,
            max_running=MAX_RUNNING,
            encoder=self._encoded,
        )
        with engine, counting() as count:
            for result in engine.generate(some):
                assert not result.error, result
        return count.mean(len(some))

    def reads(self, pruning: Pruning) -> tuple[str, int]:
        """What stands for the features that a setting reads: the encoder, and what that leaves of
        the largest image."""
        pruning, adapter = self.adapter.settle(pruning), self.adapter
        left = pruning.encoded(adapter.max_visual_tokens, adapter.decoder.num_layers)
        return pruning.encoder, left

    def _encode(self, pruning: Pruning) -> None:
        """All images, unless they are there from the setting before."""
        wanted = self.reads(pruning)
        if wanted == self._encoded_as:
            return
        self._encoded.forget()
        layers = self.adapter.decoder.num_layers
        inputs = [one.image_inputs[0] for one in self._images]
        keeps = [pruning.encoded(one.image_tokens[0], layers) for one in self._images]
        self._encode_s, self._reduce_s = self._encoded.fill(inputs, pruning.encoder, keeps)
        self._encoded_as = wanted


def _prepared(prepare: Preprocessor, asked: Sequence[Asked]) -> list[Prepared]:
    """The requests; those about one scene share its image's inputs."""
    inputs: dict[int, Any] = {}
    requests = []
    for one in asked:
        request = prepare(one.request)
        assert isinstance(request, Prepared), request
        shared = inputs.setdefault(one.scene, request.image_inputs)
        requests.append(replace(request, image_inputs=shared))
    return requests


def _answers(engine: Engine, requests: Sequence[Prepared]) -> list[Result]:
    """Results in the order of the requests.

    Raises:
        UserError: one of them failed, which is no wrong answer.
    """
    results = {result.id: result for result in engine.generate(requests)}
    failed = next((result for result in results.values() if result.error), None)
    if failed is not None:
        raise UserError(f"request {failed.id} cannot be measured: {failed.error}")
    return [results[number] for number in range(len(requests))]


def total_flops(
    adapter: Adapter,
    pruning: Pruning,
    request: Prepared,
    result: Result,
    text_tower: TextTower | None = None,
) -> Flops:
    """All that reading a prompt with one image takes.

    Args:
        pruning: settled.
        result: what became of the request under it.
        text_tower: where it takes part.
    """
    (visual,) = request.image_tokens
    text = len(request.input_ids) - visual
    return Flops(
        decoder=result.prefill_flops or 0.0,
        encoder=encoder_flops(adapter, pruning, request, text_tower),
        choosing=choosing_flops(adapter.shape(), pruning, request.image_tokens, text),
    )


class _Comparison:
    """Holds every setting against the unpruned model on the same requests."""

    def __init__(
        self,
        adapter: Adapter,
        asked: Sequence[Asked],
        requests: Sequence[Prepared],
        unpruned: _Run,
        seed: int,
    ) -> None:
        self._adapter = adapter
        self._asked = asked
        self._requests = requests
        self._unpruned = unpruned
        self._right_before = self._right(unpruned)
        self._bootstrap = ClusteredBootstrap(np.array([one.scene for one in asked]), seed=seed)
        kinds = np.array([one.kind for one in asked])
        self._parts = {
            "all": np.ones(len(asked), bool),
            "questions": kinds != "caption",
            "captions": kinds == "caption",
        }
        self._kinds = {kind: kinds == kind for kind in KINDS}

    def summary(self, row: Setting, run: _Run) -> dict[str, Any]:
        """The keys of a row of the JSON file."""
        pruning, right = run.pruning, self._right(run)
        has_proxy = pruning.method in PROXY_METHODS
        measured = [result.retention for result in run.results if result.retention is not None]
        agreement = Agreement.between(self._unpruned.results, run.results)
        return {
            "label": row.label,
            "method": pruning.method,
            "encoder": pruning.encoder,
            "retention": pruning.retention,
            "retention_measured": float(np.mean(measured)),
            "proxy_positions": pruning.proxy_positions if has_proxy else None,
            "proxy_layer": pruning.proxy_layer if has_proxy else None,
            "proxy_head": pruning.proxy_head if has_proxy else None,
            "fill_up": pruning.fill_up if pruning.method == "trio" else None,
            "position_ids": pruning.position_ids,
            "schedule": self._schedule(pruning),
            "fill_up_share": None if run.filled is None else asdict(run.filled),
            **{part: self._score(right, chosen) for part, chosen in self._parts.items()},
            "by_kind": {
                kind: self._score(right, chosen) if chosen.any() else None
                for kind, chosen in self._kinds.items()
            },
            "caption_objects": self._objects(run),
            "agreement": asdict(agreement),
            "flops": self._flops(run),
            "ms": self._ms(run),
            "own_time_share": self._own_time_share(run),
        }

    def _right(self, run: _Run) -> np.ndarray:
        return np.array(
            [
                exact_match(result.response or "", [one.answer])
                for one, result in zip(self._asked, run.results, strict=True)
            ]
        )

    def _score(self, right: np.ndarray, chosen: np.ndarray) -> dict[str, Any]:
        """Of the chosen requests."""
        after, before = right & chosen, self._right_before & chosen
        n, both = int(chosen.sum()), int((after & before).sum())
        return {
            "n": n,
            "right": int(after.sum()),
            "right_unpruned": int(before.sum()),
            "still_right": both,
            "still_right_interval": wilson_interval(both, int(before.sum()))
            if before.any()
            else None,
            "accuracy": float(after.sum() / n),
            "interval": wilson_interval(int(after.sum()), n),
            "relative": float(after.sum() / before.sum()) if before.any() else None,
            "relative_interval": self._bootstrap.ratio(after, before),
        }

    def _schedule(self, pruning: Pruning) -> str | None:
        """The stages in the decoder of the largest image, as counts."""
        adapter = self._adapter
        stages = pruning.stages(adapter.max_visual_tokens, adapter.decoder.num_layers)
        return ",".join(f"{layer}:{keep}" for layer, keep in stages) or None

    def _objects(self, run: _Run) -> float:
        """Share of objects named rightly in captions."""
        shares = [
            object_share(result.response or "", [one.answer])
            for one, result in zip(self._asked, run.results, strict=True)
            if one.kind == "caption"
        ]
        return float(np.mean(shares))

    def _flops(self, run: _Run) -> dict[str, float]:
        """Means per request, and the unpruned model's over them."""
        own, before = self._counted(run), self._counted(self._unpruned)
        mean = {name: value / len(self._requests) for name, value in asdict(own).items()}
        return {
            **mean,
            "total": own.total / len(self._requests),
            "ratio": before.total / own.total,
            "ratio_decoder": before.decoder / own.decoder,
        }

    def _counted(self, run: _Run) -> Flops:
        return _sum(
            total_flops(self._adapter, run.pruning, request, result, run.text_tower)
            for request, result in zip(self._requests, run.results, strict=True)
        )

    def _ms(self, run: _Run) -> dict[str, float]:
        """Milliseconds per image; `reduce` is within `encode`, `prune` within `prefill`."""
        seconds = {
            "image": run.encode_s + run.prefill_s + run.decode_s,
            "encode": run.encode_s,
            "reduce": run.reduce_s,
            "prefill": run.prefill_s,
            "prune": run.prune_s,
            "decode": run.decode_s,
        }
        return {name: 1e3 * value for name, value in seconds.items()}

    def _own_time_share(self, run: _Run) -> float:
        return (run.reduce_s + run.prune_s) / (run.encode_s + run.prefill_s)


def _sum(parts: Iterable[Flops]) -> Flops:
    rows = [(part.decoder, part.encoder, part.choosing) for part in parts]
    decoder, encoder, choosing = map(sum, zip(*rows, strict=True))
    return Flops(decoder=decoder, encoder=encoder, choosing=choosing)


def describe(model: Any, requests: int, conditions: Mapping[str, Any]) -> str:
    """The conditions of the measurement, in one line."""
    seeds = ", ".join(map(str, conditions["seeds"]))
    return (
        f"{requests} requests about {conditions['scenes']} held-out scenes a seed, "
        f"seed {seeds}; greedy, {str(model.dtype).removeprefix('torch.')} on {model.device}"
    )
