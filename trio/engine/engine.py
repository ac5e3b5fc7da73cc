"""The engine's loop: schedule, run, postprocess."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor, cuda

from trio import allocator
from trio import openmp as waiting
from trio.bundled import is_bundled, prompts_notice
from trio.decoder.gpu import sent
from trio.decoder.stopwatch import Stopwatch
from trio.decoder.weights import how_to_mend
from trio.engine.admission import Admission
from trio.engine.decoding.candidates import candidate_scores
from trio.engine.decoding.constraints import Constraints
from trio.engine.decoding.generation_rules import Rules
from trio.engine.decoding.logits_rules import check, note, ruled
from trio.engine.decoding.sampler import Chosen, choose, stream
from trio.engine.kv_budget import TEXT_TOKENS, MemoryPlan
from trio.engine.loading import default_kv_bytes, default_limits, load, load_text_tower
from trio.engine.metrics import Counters, report
from trio.engine.model_runner import ModelRunner
from trio.engine.preprocess import Preprocessor, ahead
from trio.engine.request import Prepared, Request, Result, Sampling, failed
from trio.engine.scheduler import Limit, Scheduler
from trio.engine.sequence import SequenceState
from trio.engine.sharing.shared_encoder import SharedEncoder
from trio.errors import UserError
from trio.families.adapter import Adapter, Features
from trio.families.pixel_limits import most_visual_tokens
from trio.families.registry import adapt
from trio.families.text_tower import TextTower
from trio.pruning.options import Pruning

# That prepare requests.
_MOST_THREADS = 8
_log = logging.getLogger(__name__)


class Engine:
    """Serves many requests at once on one device.

    `model`, `processor`: of transformers, already on their device.
    `pruning`: None prunes nothing.
    `sampling`: for requests without their own.
    `batch_tokens`: tokens that one step computes at most; bounds the prefill's memory. None: 65,536
        on GPUs of at least 64 GB, else 16,384; less where a GPU's free memory wants it.
    `max_running`: most requests in the running batch; None: 256 on a GPU, 64 on a CPU.
    `kv_bytes`: memory for keys and values, taken at once; None takes a part of what is free.
    `system`: message for requests without their own; None leaves it to the chat template.
    `memory_share`: of a GPU's memory, where several engines share one; for `kv_bytes` None.
    `encoder`: of images, for engines that read the same ones after one another; None: one of its
        own, which keeps what it made of the last ones.
    `text_tower`: of the model's vision encoder, for methods that need it.
    `share_images`: whether prompts that begin alike, as several questions on one image do, share
        what the layers before the first stage make of it.

    `memory_plan` says how many requests the memory holds at once, `decoding` which rules the
    checkpoint's `generation_config.json` has; what it asks for and is not followed is logged. One
    thread submits and steps; `prepare` may be called from any. `close`, or the end of a `with`,
    gives the memory back.

    Raises:
        UserError: model, processor and pruning do not go together, or there is no memory.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        pruning: Pruning | None = None,
        sampling: Sampling | None = None,
        batch_tokens: int | None = None,
        max_running: int | None = None,
        kv_bytes: int | None = None,
        memory_share: float = 1.0,
        system: str | None = None,
        encoder: SharedEncoder | None = None,
        text_tower: TextTower | None = None,
        share_images: bool = True,
    ) -> None:
        adapter = adapt(model)
        if adapter.decoder.device.type == "meta":
            raise UserError("the model is on the meta device, without weights; load them first")
        if adapter.decoder.device.type == "cpu":
            waiting.warn(torch.get_num_threads())
        self.prepare = Preprocessor(processor, type(adapter), system)
        sample = _check_fit(self.prepare, adapter)
        usual_tokens, usual_running = default_limits(adapter.decoder, memory_share)
        batch_tokens = usual_tokens if batch_tokens is None else batch_tokens
        max_running = usual_running if max_running is None else max_running
        if batch_tokens < 1 or max_running < 1:
            raise UserError("batch_tokens and max_running must be at least 1")
        if kv_bytes is None:
            kv_bytes = default_kv_bytes(adapter.decoder, batch_tokens, memory_share)
        self._runner = ModelRunner(
            adapter,
            pruning or Pruning(),
            kv_bytes=kv_bytes,
            max_running=max_running,
            encoder=encoder,
            text_tower=text_tower,
            share_images=share_images,
        )
        self._cache = self._runner.cache
        self._scheduler: Scheduler[SequenceState] = Scheduler(
            self._cache, batch_tokens=batch_tokens
        )
        self._is_closed = False
        self._another = partial(
            Engine,
            model,
            processor,
            sampling=sampling,
            batch_tokens=batch_tokens,
            max_running=max_running,
            system=system,
            text_tower=text_tower,
            share_images=share_images,
        )
        self._shape = adapter.shape()
        eos = end_of_sequence(model, processor)
        self.decoding = Rules.of(model)
        check(self.decoding, sample.input_ids, len(adapter.decoder.lm_head.weight), eos)
        if self.decoding.notice is not None:
            _log.warning("%s", self.decoding.notice)
        constraints = Constraints(
            processor.tokenizer,
            self.prepare,
            vocabulary=len(adapter.decoder.lm_head.weight),
            eos=eos,
        )
        if sampling is not None and sampling.constraint is not None:
            stop = eos.union(sampling.stop_token_ids)
            constraints(sampling.constraint, stop)  # for its errors
        self._admission = Admission(
            self._runner,
            sampling=sampling or Sampling(),
            eos=eos,
            rules=self.decoding,
            constraints=constraints,
        )
        self._planned = self._plan(sampling or Sampling(), most_visual_tokens(processor))
        self._room_limit = Limit(self._cache.room.max_running)
        self._prefill_limit = Limit(batch_tokens)
        self._done: list[Result] = []
        self._under_way: deque[tuple[list[SequenceState], Chosen]] = deque()
        """Decode steps whose outcome has not been looked at."""
        self._counters = Counters()
        self._idle_since: float | None = time.perf_counter()
        self._checks_prompts = is_bundled(getattr(processor.tokenizer, "name_or_path", ""))
        if adapter.decoder.device.type == "cpu":
            allocator.keep_pages()

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        revision: str | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        text_tower: str | None = None,
        text_tower_revision: str | None = None,
        **options: Any,
    ) -> Engine:
        """Load a model and its processor from a directory or the hub.

        Args:
            model: directory, or hub id; safetensors only, not quantised, and no code of the
                repository is run. "demo" is the bundled one, also where a directory is called so.
            device: None takes the GPU if there is one.
            dtype: float32, bfloat16, float16, float64, or "auto" for the checkpoint's; None takes
                bfloat16 on a GPU that has it, float32 on a CPU, but where that has matrix units
                (amx_bf16) bfloat16 for a checkpoint in half precision. What is not the checkpoint's
                own, or differs by machine, is said in one line.
            revision: commit, tag or branch of a hub id; None takes its main branch.
            min_pixels, max_pixels: width times height to which an image is enlarged or reduced
                before the model sees it, for models that take images at many sizes (Qwen-VL);
                None leaves the processor's own limit.
            text_tower: for methods `eadp` and `cdpruner`: directory or hub id of the CLIP
                checkpoint that the model's vision encoder was taken from.
            text_tower_revision: as `revision`, of a hub id given there.
            options: as for `Engine`.

        Raises:
            UserError: nothing usable there, files that are missing or damaged, an architecture, a
                quantisation, a device or a setting that is not supported.
        """
        loaded = load(
            model,
            device=device,
            dtype=dtype,
            revision=revision,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
        )
        if text_tower is not None:
            options["text_tower"] = load_text_tower(loaded[0], text_tower, text_tower_revision)
        return cls(*loaded, **options)

    def beside(
        self,
        prunings: Sequence[Pruning],
        *,
        share: float | None = None,
        encoding: bool = True,
    ) -> list[Engine]:
        """Engines on this one's model: one with its pruning, and one for each of others.

        They are to work one after the other: they share the memory for keys and values, and an
        image that they read as the same `Prepared` is encoded once. What that spares an engine is
        in its `encode_s` all the same. This one is closed; without others it is what is returned.

        Args:
            prunings: of the others.
            share: of the memory, that each of the others gets; None: all the same.
            encoding: whether what the encoder gives is held for the others, until `release`.
        """
        self._check_open()
        if not prunings:
            return [self]
        budget = self._cache.allocated_bytes + self._runner.prefixes.budget
        self.close()
        shared = SharedEncoder(self._runner.adapter, hold=True) if encoding else None
        part = 1 / (1 + len(prunings)) if share is None else share
        parts = [1 - part * len(prunings), *[part] * len(prunings)]
        made = [
            self._another(
                pruning=pruning,
                kv_bytes=int(part * budget),
                encoder=shared,
            )
            for pruning, part in zip((self._runner.pruning, *prunings), parts, strict=True)
        ]
        if shared is not None:
            shared.join = next((e._runner.join for e in made if e._runner.join is not None), None)
        return made

    def release(self, prepared: Prepared) -> None:
        """No engine `beside` this one is to read these images again."""
        self._runner.release(prepared)

    def close(self) -> None:
        """Give back the memory for keys and values, recorded steps and features of images, on a CPU
        also what the process keeps for tensors to come, and drop what waits or runs; the model
        stays with whoever has it. Figures can still be read."""
        if self._is_closed:
            return
        self.reset()
        self._runner.close()
        self._is_closed = True
        if self._runner.decoder.device.type == "cuda":
            cuda.empty_cache()
        else:
            allocator.give_back()

    def __enter__(self) -> Engine:
        self._check_open()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise UserError("this engine is closed; make another")

    def generate(self, requests: Iterable[Request | Prepared]) -> Generator[Result, None, None]:
        """Serve requests, pulled as there is room for them and some ahead, which threads prepare
        meanwhile; results come as they finish."""
        self._check_open()
        busy = self.has_work
        if busy:
            raise UserError("this engine is serving other requests; let them finish first")
        threads = min(_MOST_THREADS, torch.get_num_threads())
        source = ahead(self.prepare, requests, threads=threads)
        try:
            while True:
                while self.wants_more and (request := next(source, None)) is not None:
                    self.submit(request)
                if not self.has_work:
                    return
                yield from self.step()
        finally:
            source.close()
            self.reset()

    @property
    def memory_plan(self) -> MemoryPlan:
        """How many requests the memory holds at once: fewer for a time after it ran out."""
        return replace(self._planned, max_running=self._cache.room.max_running)

    @property
    def has_work(self) -> bool:
        """Whether a step would do or return something."""
        return bool(self._done) or self._scheduler.has_work

    @property
    def wants_more(self) -> bool:
        """Whether less is waiting than a step could take in; a hint for whoever submits.

        Failed results that wait for a step count as well, so that they come out in time.
        """
        waiting = self._scheduler.waiting
        tokens = sum(sequence.prompt_tokens for sequence in waiting)
        count = len(waiting) + len(self._done)
        return count < self._room_limit.most and tokens < self._scheduler.batch_tokens

    def submit(self, request: Request | Prepared | Result) -> None:
        """Queue a request; what `prepare` returned may be handed on as it is.

        A request that cannot be served comes out of the next step as a failed result.
        """
        self._check_open()
        if self._checks_prompts and isinstance(request, Request | Prepared):
            self._check_prompt(request.prompt)
        prepared = self.prepare(request) if isinstance(request, Request) else request
        sequence = self._admission(prepared) if isinstance(prepared, Prepared) else prepared
        if isinstance(sequence, SequenceState):
            self._scheduler.add(sequence)
        else:
            self._fail(sequence)

    def step(self) -> list[Result]:
        """Take in what fits, give every running request one more token, return what is finished.

        Where the device runs out of memory, what was under way is done again in smaller parts,
        which grow again while all goes well; a request that does not fit even alone fails. One
        whose numbers are not finite fails by itself. What else goes wrong on the device is raised;
        `reset` then makes the engine usable again.
        """
        self._check_open()
        self._count_idle()
        if self._runner.decoder.device.type == "cuda":
            cuda.set_device(self._runner.decoder.device)  # of this thread: streams, events, kernels
        if admitted := self._scheduler.admit():
            self._sparing(self._prefill, admitted)
        if self._scheduler.running:
            sequences = [self._scheduler.running[key] for key in self._cache.order]
            self._sparing(self._decode, sequences)
        if not self._scheduler.running:
            self._under_way.clear()
        self._idle_since = None if self._scheduler.has_work else time.perf_counter()
        done, self._done = self._done, []
        return done

    def reset(self) -> None:
        """Drop all that waits or runs, and what is known of images."""
        self._under_way.clear()
        self._scheduler.clear()
        self._runner.reset()
        self._done.clear()
        if self._idle_since is None:
            self._idle_since = time.perf_counter()

    def stats(self, *, reset: bool = False) -> dict[str, Any]:
        """Counters since the last reset, the limits as they are now, and whether CUDA graphs are
        in use (`on`, or `off: ` and why); absent figures are None."""
        self._count_idle()
        device = self._runner.decoder.device
        peak = cuda.max_memory_allocated(device) if device.type == "cuda" else None
        counted = {
            **self._counters.as_dict(),
            "device_bytes_peak": peak,
            "max_running": self._cache.room.max_running,
            "batch_tokens": self._scheduler.batch_tokens,
            "kv_budget_bytes": self._cache.budget,
            "cuda_graphs": self._runner.cuda_graphs,
        }
        if reset:
            self._counters = Counters()
            if device.type == "cuda":
                cuda.reset_peak_memory_stats(device)
        return counted

    def _plan(self, sampling: Sampling, most: int | None) -> MemoryPlan:
        """most: visual tokens of an image within the processor's limits, if it has any."""
        cache, visual = self._cache, self._runner.adapter.planned_visual_tokens
        visual = visual if most is None else min(visual, most)
        need = self._runner.need(visual + TEXT_TOKENS, [visual], sampling.max_new_tokens)
        longest = (visual + TEXT_TOKENS + sampling.max_new_tokens - 1,) * len(need)
        return MemoryPlan(
            kv_budget_bytes=cache.budget,
            max_running=cache.room.max_running,
            request_bytes=cache.bytes_of(need),
            request_bytes_unpruned=cache.bytes_of(longest),
        )

    def _check_prompt(self, prompt: str) -> None:
        """Say once that the bundled model was not taught a prompt."""
        line = prompts_notice([prompt])
        if line is not None:
            self._checks_prompts = False
            _log.warning("%s", line)

    def _count_idle(self) -> None:
        """Idle time up to now belongs to the counters as they are."""
        if self._idle_since is not None:
            since, self._idle_since = self._idle_since, time.perf_counter()
            self._counters.idle_s += self._idle_since - since

    def _sparing(
        self, work: Callable[[list[SequenceState]], None], sequences: list[SequenceState]
    ) -> None:
        """Runs `work`; on OutOfMemoryError requeues its requests and halves the batch."""
        try:
            work(sequences)
            return self._went_well(work)
        except torch.OutOfMemoryError as error:
            self._counters.out_of_memory += 1
            caught = error.with_traceback(None)  # whose frames hold the step's tensors
        self._finish(self._look_at_steps(but=0))
        sequences = [sequence for sequence in sequences if sequence.key in self._scheduler.running]
        self._scheduler.put_back(sequences)
        self._runner.forget()
        torch.cuda.empty_cache()
        if not sequences:
            return
        if work == self._decode:
            self._cache.room.max_running = self._room_limit.cut(len(sequences) // 2)
        else:
            tokens = sum(sequence.prompt_tokens for sequence in sequences)
            self._scheduler.batch_tokens = self._prefill_limit.cut(tokens // 2)
        for sequence in sequences:
            sequence.restart(stream(sequence.sampling))
        if len(sequences) == 1 and not self._scheduler.running:
            self._give_up_or_retry(sequences[0], caught)

    def _went_well(self, work: Callable[[list[SequenceState]], None]) -> None:
        if work == self._decode:
            self._cache.room.max_running = self._room_limit.went_well()
        else:
            self._scheduler.batch_tokens = self._prefill_limit.went_well()

    def _give_up_or_retry(self, sequence: SequenceState, error: Exception) -> None:
        """What ran out of memory with the device to itself gets one more try."""
        if sequence.tried_alone:
            self._scheduler.waiting.remove(sequence)
            self._fail(_no_memory(sequence, str(error)))
        sequence.tried_alone = True

    def _prefill(self, sequences: list[SequenceState]) -> None:
        encoding, reading = (Stopwatch(self._runner.decoder.device) for _ in range(2))
        complete: list[SequenceState] = []
        with encoding.running():
            sequences, features, saved_s = self._encode(sequences)
        with reading.running():
            if sequences:
                complete = self._read(sequences, features)
        # Of a GPU the first tokens have been looked at, so that nothing is waited for.
        encode_s, prefill_s = encoding.seconds() + saved_s, reading.seconds()
        self._counters.encode_s += encode_s
        self._counters.prefill_s += prefill_s
        tokens = sum(sequence.prompt_tokens for sequence in sequences)
        for sequence in sequences:
            sequence.prefill_s = (encode_s + prefill_s) * sequence.prompt_tokens / tokens
        self._finish(complete)

    def _read(
        self, sequences: list[SequenceState], features: list[list[Features]]
    ) -> list[SequenceState]:
        """Runs prompts and gives first tokens, or scores; returns what is complete with that."""
        prefixes, counters = self._runner.prefixes, self._counters
        before = prefixes.image_layers, prefixes.followers
        ahead = {sequence.prefix for sequence in self._scheduler.waiting}
        logits_BV, prune_s = self._runner.prefill(sequences, features, ahead)
        counters.image_layers += prefixes.image_layers - before[0]
        counters.shared_prompts += prefixes.followers - before[1]
        _note_distributions(sequences, logits_BV)
        complete = self._score(*_those(sequences, logits_BV, scored=True))
        complete += self._start(*_those(sequences, logits_BV, scored=False))
        counters.prune_s += prune_s
        return complete

    def _start(self, sequences: list[SequenceState], logits_BV: Tensor) -> list[SequenceState]:
        """Gives sequences their first token; those that are complete with it are returned."""
        if not sequences:
            return []
        complete = self._append(sequences, _choose(sequences, logits_BV))
        self._runner.start([sequence for sequence in sequences if sequence.failure is None])
        return complete

    def _score(self, sequences: list[SequenceState], logits_BV: Tensor) -> list[SequenceState]:
        """Scores the candidates of sequences whose prompts are there; returns these."""
        if not sequences:
            return []
        self._note_peak()
        most, scoring = self._scheduler.batch_tokens, Stopwatch(logits_BV.device)
        with scoring.running():
            scores = candidate_scores(self._runner, sequences, logits_BV, batch_tokens=most)
        for sequence, own in zip(sequences, scores, strict=True):
            if all(math.isfinite(token.logprob) for candidate in own for token in candidate):
                sequence.candidate_logprobs = [[one.logprob for one in each] for each in own]
                sequence.candidate_is_top = [[one.is_top for one in each] for each in own]
            else:
                sequence.failure = not_finite(sequence, self._runner.decoder.dtype)
        self._counters.score_s += scoring.seconds()
        return sequences

    def _encode(
        self, sequences: list[SequenceState]
    ) -> tuple[list[SequenceState], list[list[Features]], float]:
        """Visual features of the sequences; those whose placeholders do not fit them are failed.
        Also the seconds that another engine's reading of the images has spared."""
        fitting, (images, saved_s) = [], self._runner.encoded_so_far
        for sequence, features in zip(sequences, self._runner.encode(sequences), strict=True):
            counts, expected = [len(image) for image in features], self._runner.encoded(sequence)
            if counts == expected:
                fitting.append((sequence, features))
                continue
            self._scheduler.finish(sequence)
            message = f"placeholders for images of {expected} tokens, but features of {counts}"
            self._fail(failed(sequence.prepared.id, "mismatch", message))
        images = self._runner.encoded_so_far[0] - images
        saved_s = self._runner.encoded_so_far[1] - saved_s
        self._counters.images_encoded += images
        self._counters.encode_saved_s += saved_s
        return [one for one, _ in fitting], [features for _, features in fitting], saved_s

    def _decode(self, sequences: list[SequenceState]) -> None:
        began = time.perf_counter()
        logits_BV = self._runner.decode()
        chosen = _choose(sequences, logits_BV)
        self._cache.rows.token_B[: len(sequences)] = chosen.tokens_B
        self._under_way.append((sequences, chosen))
        finished = self._look_at_steps(but=self._runner.lag)
        seconds = time.perf_counter() - began
        self._counters.decode_s += seconds
        self._counters.decode_steps += 1
        self._counters.decode_rows += len(sequences)
        for sequence in sequences:
            sequence.decode_s += seconds / len(sequences)
        self._finish(finished)

    def _look_at_steps(self, *, but: int) -> list[SequenceState]:
        """Gives sequences the tokens of decode steps, up to the newest `but`; returns the complete
        ones."""
        complete: list[SequenceState] = []
        while len(self._under_way) > but:
            sequences, chosen = self._under_way.popleft()
            complete += self._append(sequences, chosen)
        return complete

    def _append(self, sequences: Sequence[SequenceState], chosen: Chosen) -> list[SequenceState]:
        """One token each, but none to those complete without it; returns those now complete."""
        complete = []
        self._note_peak()
        for sequence, token, logprob in zip(
            sequences, chosen.token_ids, chosen.logprobs, strict=True
        ):
            before = sequence.finish_reason
            if before is not None:
                continue
            if math.isfinite(logprob):
                sequence.append(token, logprob)
            else:
                sequence.failure = self._failure(sequence, logprob)
                if sequence.constrained is not None and not math.isnan(logprob):
                    sequence.failure_kind = "constraint"
            if sequence.finish_reason is not None:
                complete.append(sequence)
        return complete

    def _note_peak(self) -> None:
        counters = self._counters
        counters.kv_used_bytes_peak = max(counters.kv_used_bytes_peak, self._cache.used_bytes)

    def _failure(self, sequence: SequenceState, logprob: float) -> str:
        """Why a sequence has no next token; `logprob` as in `Chosen`."""
        if math.isnan(logprob):
            return not_finite(sequence, self._runner.decoder.dtype)
        if sequence.sampling.constraint is not None:
            said = self.prepare.decode(sequence.token_ids)
            return f"{sequence.sampling.constraint.name}: no token may come behind {said!r}"
        return "rules of decoding, or a temperature near 0, leave no token to choose from"

    def _finish(self, sequences: Sequence[SequenceState]) -> None:
        """Turn what is complete into results and give its memory back."""
        counters = self._counters
        for sequence in sequences:
            self._scheduler.finish(sequence)
            result = self._report(sequence)
            if result.finish_reason == "error":
                self._fail(result)
                continue
            self._done.append(result)
            counters.requests += 1
            counters.images += len(sequence.spans)
            counters.prompt_tokens += sequence.prompt_tokens
            counters.output_tokens += len(sequence.token_ids)
            counters.candidate_tokens += sum(map(len, sequence.candidate_logprobs))

    def _report(self, sequence: SequenceState) -> Result:
        result = report(
            sequence,
            shape=self._shape,
            bytes_per_element=self._runner.decoder.dtype.itemsize,
            decode=self.prepare.decode,
            beside=self._runner.beside_decoder(sequence.prepared),
            explanation=self._runner.explanation(sequence),
        )
        if sequence.constrained is None or result.finish_reason == "error":
            return result
        return sequence.constrained.judge(result)

    def _fail(self, result: Result) -> None:
        self._counters.failed += 1
        self._done.append(result)


def _choose(sequences: Sequence[SequenceState], logits_BV: Tensor) -> Chosen:
    """The next token of each sequence, by its rules of decoding and its sampling."""
    samplings, streams = (
        [sequence.sampling for sequence in sequences],
        [sequence.stream for sequence in sequences],
    )
    ruled_BV = ruled(sequences, logits_BV)
    chosen = choose(logits_BV, samplings, streams, ruled_BV)
    if ruled_BV is not None:
        note(sequences, chosen)
    return chosen


def _those(
    sequences: list[SequenceState], logits_BV: Tensor, *, scored: bool
) -> tuple[list[SequenceState], Tensor]:
    """The sequences that have candidates, or that have none, with their logits."""
    rows = [row for row, one in enumerate(sequences) if bool(one.prepared.candidates) == scored]
    own = logits_BV
    if len(rows) < len(sequences):
        own = logits_BV[sent(torch.tensor(rows, dtype=torch.int64), logits_BV.device)]
    return [sequences[row] for row in rows], own


def _note_distributions(sequences: Sequence[SequenceState], logits_BV: Tensor) -> None:
    """Log-probabilities of all first tokens, for the sequences that ask for them."""
    for sequence, logits_V in zip(sequences, logits_BV, strict=True):
        if sequence.sampling.first_logprobs:
            sequence.first_logprobs = logits_V.float().log_softmax(dim=-1).cpu()


def not_finite(sequence: SequenceState, dtype: torch.dtype) -> str:
    """Of a sequence's next logits."""
    step = len(sequence.token_ids)
    where = f"in decode step {step}" if step else "in prefill"
    kind = str(dtype).removeprefix("torch.")
    return f"NaN or infinity {where}, computed in {kind}: {how_to_mend(dtype)}"


def _no_memory(sequence: SequenceState, message: str) -> Result:
    return failed(sequence.prepared.id, "no_room", f"the device ran out of memory: {message}")


def _check_fit(prepare: Preprocessor, adapter: Adapter) -> Prepared:
    """Serve the encoder one image: a processor of another model would spoil every request.

    Returns the prompt that it stands in.
    """
    sample = prepare(Request(prompt="", images=(Image.new("RGB", (64, 64)),)))
    if isinstance(sample, Result):
        raise UserError(f"the processor cannot prepare a request: {sample.error}")
    try:
        adapter.check_inputs(sample.image_inputs[0])
    except UserError as error:
        raise UserError(f"the processor does not fit the model: {error}") from error
    (features,) = adapter.encode_images(sample.image_inputs)
    counted = adapter.visual_tokens(sample.image_inputs[0])
    if counted != [len(features)]:
        raise UserError(
            f"{type(adapter).__name__}.visual_tokens says {counted} of an image, and the encoder "
            f"gives {len(features)} features"
        )
    if len(features) != sample.image_tokens[0]:
        raise UserError(
            f"the processor does not fit the model: it writes {sample.image_tokens[0]} placeholder "
            f"tokens for an image, and the encoder gives {len(features)} features"
        )
    return sample


def end_of_sequence(model: Any, processor: Any) -> frozenset[int]:
    """The model's own stop tokens: what its generation config says, else its tokenizer."""
    config = getattr(model, "generation_config", None)
    tokens = getattr(config, "eos_token_id", None)
    if tokens is None:
        tokens = processor.tokenizer.eos_token_id
    return frozenset([tokens] if isinstance(tokens, int) else tokens or [])
