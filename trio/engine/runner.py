"""The one that touches the device: images and prompts in, logits out.

Shapes: T packed tokens, B requests, D hidden size, V vocabulary, N visual tokens of an image.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor

from trio.config import Pruning
from trio.engine.cache import Cache
from trio.engine.entry import Entry, entered
from trio.engine.graphs import StepGraphs, rounded_up
from trio.engine.relevance import Relevances
from trio.engine.room import Need
from trio.engine.task import Task
from trio.errors import UserError
from trio.models.adapter import Adapter, Features, joined
from trio.models.attention import Padded
from trio.models.prefill import PackedPrompts, prefill
from trio.models.products import few_row_linears
from trio.models.stopwatch import Stopwatch
from trio.models.text_tower import TextTower
from trio.pruning.candidates import Relevance
from trio.pruning.methods.random import salt_of


class Runner:
    """Model, pruning and cache, one step at a time.

    Raises:
        UserError: the pruning settings cannot be met by this model.
    """

    def __init__(
        self,
        adapter: Adapter,
        pruning: Pruning,
        *,
        kv_bytes: int,
        max_running: int,
        text_tower: TextTower | None = None,
    ) -> None:
        if pruning.method == "eadp" and text_tower is None:
            raise UserError(
                "method eadp compares images with prompts in the space that CLIP's towers share: "
                "give as text_tower (--text-tower) the CLIP checkpoint that the model's vision "
                "encoder was taken from, openai/clip-vit-large-patch14-336 for LLaVA-1.5"
            )
        self.adapter = adapter
        asked = text_tower if pruning.method == "eadp" else None
        self._join = asked.project if asked else None
        self._relevances = Relevances(asked) if asked else None
        self.decoder = adapter.decoder
        self.pruning = adapter.settle(pruning)
        self.num_layers = self.decoder.num_layers
        # Stages lie at the same layers for images of any size, and a retention in reach for the
        # largest is in reach for all.
        stages = self.pruning.stages(adapter.max_visual_tokens, self.num_layers)
        self.cache = Cache(
            # A stage behind the last layer leaves keys and values as they are.
            group_starts=sorted({0, *(layer for layer, _ in stages if layer < self.num_layers)}),
            num_layers=self.num_layers,
            num_kv_heads=self.decoder.num_kv_heads,
            head_dim=self.decoder.head_dim,
            dtype=self.decoder.dtype,
            device=self.decoder.device,
            budget=kv_bytes,
            max_slots=max_running,
        )
        gpu = self.decoder.device.type == "cuda"
        self.replay: Callable[[int, int], Tensor] | None = StepGraphs(self._step) if gpu else None
        """Runs `_step` on a padded number of rows, where that is faster."""
        self.lag = 1 if gpu else 0
        """Decode steps that may be under way while the outcome of an earlier one is unknown."""

    def need(self, prompt_tokens: int, image_tokens: Sequence[int], new_tokens: int) -> Need:
        """Tokens a request may come to store, per layer group."""
        removed = [0] * len(self.cache.spans)
        for count in image_tokens:
            kept = dict(self.pruning.stages(count, self.num_layers))
            left = self.pruning.encoded(count, self.num_layers)
            for group, (start, _) in enumerate(self.cache.spans):
                left = kept.get(start, left)
                removed[group] += count - left
        # The last token of an answer is never fed back, so it is never stored, unless a step runs
        # before it is known to be the last.
        stored = new_tokens - 1 + self.lag
        return tuple(prompt_tokens - gone + stored for gone in removed)

    def encode(self, tasks: Sequence[Task]) -> list[list[Features]]:
        """Visual features of each task's images, in one pass of the encoder."""
        inputs = [image for task in tasks for image in task.prepared.image_inputs]
        if not inputs:
            return [[] for _ in tasks]
        keeps = [keep for task in tasks for keep in self.encoded(task)]
        encoder = self.pruning.encoder
        features = iter(self.adapter.encode_images(inputs, encoder, keeps, self._join))
        return [[next(features) for _ in task.prepared.image_inputs] for task in tasks]

    def encoded(self, task: Task) -> list[int]:
        """Visual tokens of each of the task's images that enter the decoder."""
        counts = task.prepared.image_tokens
        return [self.pruning.encoded(count, self.num_layers) for count in counts]

    def prefill(
        self, tasks: Sequence[Task], features: Sequence[Sequence[Features]]
    ) -> tuple[Tensor, float]:
        """Run the prompts of fresh tasks; returns logits [B, V] and the seconds of pruning."""
        comparing = Stopwatch(self.decoder.device)
        with comparing.running():
            relevance = self._relevance(tasks, features)
        done = prefill(
            self.decoder,
            replace(self._packed(tasks, features), relevance=relevance),
            self.pruning,
            self.cache.prefill([task.key for task in tasks]),
        )
        for row, task in enumerate(tasks):
            task.layer_tokens = [lengths[row] for lengths in done.cache_lengths]
            task.positions = [done.next_positions[start][row] for start, _ in self.cache.spans]
            task.entered = entered(task.prepared.image_tokens, features[row])
            task.kept = [_by_source(stage, task.entered) for stage in done.kept[row]]
        return done.logits_BV, done.prune_seconds + comparing.seconds()

    def _relevance(
        self, tasks: Sequence[Task], features: Sequence[Sequence[Features]]
    ) -> list[list[Relevance]]:
        """What the images' tokens matter for the prompts, where the method asks for it."""
        if self._relevances is None:
            return []
        return self._relevances([task.prepared.prompt for task in tasks], features)

    def _packed(
        self, tasks: Sequence[Task], features: Sequence[Sequence[Features]]
    ) -> PackedPrompts:
        """The tasks' prompts with as many placeholders as the encoder has left tokens."""
        lengths, spans = tuple(t.prompt_tokens for t in tasks), tuple(t.spans for t in tasks)
        images = [image for task in tasks for image in task.prepared.image_inputs]
        ids_T = torch.tensor([token for task in tasks for token in task.prepared.input_ids])
        positions_T = self.adapter.positions(lengths, spans, images)
        if self.pruning.encoder != "none":
            entry = Entry.of(lengths, spans, features)
            lengths, spans, ids_T = entry.lengths, entry.spans, ids_T[entry.index_T]
            # A stage like those in the decoder: numbered anew what is left stands at 0, 1, 2, ...
            if self.pruning.position_ids == "renumber":
                positions_T = None
            if positions_T is not None:
                positions_T = positions_T[..., entry.index_T]
        own = list(chain.from_iterable(features))
        salted = self.pruning.method == "random"
        return PackedPrompts(
            embeds_TD=self.adapter.embed(ids_T, own),
            lengths=lengths,
            images=spans,
            positions_T=positions_T,
            injected=joined(own),
            given=[task.prepared.image_tokens for task in tasks],
            salts=tuple(salt_of(t.prepared.input_ids) for t in tasks) if salted else (),
        )

    def start(self, tasks: Sequence[Task]) -> None:
        """Let tasks whose prompts and first tokens are there take part in decoding."""
        self.cache.start(
            [task.key for task in tasks],
            [task.token_ids[-1] for task in tasks],
            [task.positions for task in tasks],
        )

    def decode(self) -> Tensor:
        """One more token of every running task, in the cache's order; returns logits [B, V].

        The tokens to feed lie in `cache.rows`; the caller puts the next ones there.
        """
        rows, count = self.cache.rows, self.cache.rows.count
        self.cache.extend()
        if self.replay is None:
            logits_BV = self._step(None)
        else:
            padded = rounded_up(count, self.cache.room.shape.slots)
            logits_BV = self.replay(padded, self.cache.generation)[:count]
        rows.position_GB[:, :count] += 1
        return logits_BV

    @torch.no_grad()
    def _step(self, padded: int | None) -> Tensor:
        """Logits of the first `padded` rows, or of just those of running tasks."""
        rows = self.cache.rows
        count = rows.count if padded is None else padded
        writer = self.cache.writer(padded)
        hidden_BD = self.decoder.embed(rows.token_B[:count])
        with self.decoder.ragged(), few_row_linears():
            for group, (start, stop) in enumerate(self.cache.spans):
                rotary = self.decoder.rotary(rows.position_GB[group, :count])
                layout = Padded(writer.length_GB[group])
                hidden_BD = self.decoder.run_layers(start, stop, hidden_BD, rotary, layout, writer)
            return self.decoder.head(hidden_BD)

    def now(self) -> float:
        """Seconds by a clock that has waited for the device."""
        if self.decoder.device.type == "cuda":
            torch.cuda.synchronize(self.decoder.device)
        return time.perf_counter()


def _by_source(stage: Sequence[int], sources: Sequence[int | None]) -> list[int | None]:
    return [sources[token] for token in stage] if sources else list(stage)
