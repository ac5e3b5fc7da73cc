"""Runs the model: images and prompts in, logits out.

Shapes: T packed tokens, B requests, D hidden size, V vocabulary, N visual tokens of an image.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import cache
from itertools import chain

import torch
from torch import Tensor

from trio.decoder.attention import Branches
from trio.decoder.gpu import sent
from trio.decoder.matmul import through_linear
from trio.decoder.stopwatch import Stopwatch
from trio.engine.contexts import Contexts
from trio.engine.cuda_graphs import Graphs, StepGraphs, rounded_up
from trio.engine.kv_budget import Need
from trio.engine.kv_cache import KVCache
from trio.engine.metrics import beside_decoder
from trio.engine.packing import Entry, before_reduction, coordinates, entered
from trio.engine.request import Explanation, Prepared
from trio.engine.sequence import SequenceState
from trio.engine.sharing.prefix_cache import PART, PrefixCache, part_for_images
from trio.engine.sharing.shared_encoder import SharedEncoder
from trio.errors import kind_and_line
from trio.families.adapter import Adapter, Features, Inputs, Join, Span, joined
from trio.families.coordinates import in_image, packed
from trio.families.text_tower import TextTower
from trio.prefill import PackedPrompts, prefill, shared_depth
from trio.pruning.batch import contiguous_positions
from trio.pruning.method_registry import create
from trio.pruning.methods.random import Salts
from trio.pruning.options import Pruning

_log = logging.getLogger(__name__)


class ModelRunner:
    """Model, pruning and cache, one step at a time.

    encoder: of images; None: one of its own.
    share_images: whether prompts on one image share what the first layers make of it.

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
        encoder: SharedEncoder | None = None,
        text_tower: TextTower | None = None,
        share_images: bool = True,
    ) -> None:
        self.adapter = adapter
        self._encoder, self._encodes_alone = encoder or SharedEncoder(adapter), encoder is None
        self.decoder = adapter.decoder
        self.decoder.fuse()
        self.pruning = adapter.settle(pruning)
        self.method = create(self.pruning) if self.pruning.chooses else None
        """None where the decoder prunes nothing."""
        self._needs: frozenset[str] = self.method.needs if self.method else frozenset()
        self._contexts = Contexts(self.method, adapter, text_tower) if self.method else None
        self.num_layers = self.decoder.num_layers
        # Stages lie at the same layers for images of any size, and a retention in reach for the
        # largest is in reach for all.
        stages = self.pruning.stages(adapter.max_visual_tokens, self.num_layers)
        depth = 0
        if share_images:
            depth = shared_depth(self.pruning, adapter.max_visual_tokens, self.num_layers)
        numbers = 2 * depth * self.decoder.num_kv_heads * self.decoder.head_dim
        self.prefixes = PrefixCache(
            depth,
            budget=part_for_images(kv_bytes) if depth else 0,
            room=kv_bytes // PART,
            token_bytes=(numbers + self.decoder.hidden_size) * self.decoder.dtype.itemsize,
        )
        kv_bytes -= self.prefixes.budget
        self.cache = KVCache(
            # A stage behind the last layer leaves keys and values as they are.
            group_starts=sorted({0, *(layer for layer, _ in stages if layer < self.num_layers)}),
            num_layers=self.num_layers,
            num_kv_heads=self.decoder.num_kv_heads,
            head_dim=self.decoder.head_dim,
            dtype=self.decoder.dtype,
            device=self.decoder.device,
            budget=kv_bytes,
            max_running=max_running,
        )
        gpu = self.decoder.device.type == "cuda"
        self.graphs: Graphs | None = StepGraphs() if gpu else None
        """Run a step on a rounded number of rows, where that is faster."""
        self.lag = 1 if gpu else 0
        """Decode steps that may be under way while the outcome of an earlier one is unknown."""

    @property
    def needs_instruction(self) -> bool:
        """Whether the method compares images with the words of their prompt in the decoder."""
        return "instruction" in self._needs

    @property
    def cuda_graphs(self) -> str | None:
        """`on`, or `off: ` and why; None without a GPU."""
        if self.decoder.device.type != "cuda":
            return None
        if self.graphs is None:
            return "off: not wanted"
        return "on" if self.graphs.trouble is None else f"off: {self.graphs.trouble}"

    def beside_decoder(self, prepared: Prepared) -> tuple[int, int]:
        """FLOPs of reading a prompt that are not the decoder's, pruned and unpruned."""
        text_tower = self._contexts.text_tower if self._contexts else None
        return beside_decoder(self.adapter, self.pruning, prepared, text_tower)

    def explanation(self, sequence: SequenceState) -> Explanation | None:
        """Of a sequence whose prompt has been read; None where it does not ask for one."""
        prepared = sequence.prepared
        if not prepared.explain:
            return None
        frames = prepared.frames or (None,) * len(prepared.image_inputs)
        boxes = [torch.empty(0, 4, dtype=torch.float32)]
        for image, frame, count in zip(
            prepared.image_inputs, frames, prepared.image_tokens, strict=True
        ):
            boxes.append(in_image(_boxes(self.adapter, image, count), frame))
        return Explanation(
            image_tokens=prepared.image_tokens,
            boxes=torch.cat(boxes).numpy(),
            saliency=tuple(sequence.scores),
        )

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

    def left_out(self, image_tokens: Sequence[int]) -> int:
        """Positions of a prompt that nothing stands at, as the encoder left its tokens out."""
        if self.pruning.position_ids == "keep":
            return 0
        return sum(n - self.pruning.encoded(n, self.num_layers) for n in image_tokens)

    def encode(self, sequences: Sequence[SequenceState]) -> list[list[Features]]:
        """Visual features of each sequence's images, in one pass of the encoder."""
        inputs = [image for sequence in sequences for image in sequence.prepared.image_inputs]
        if not inputs:
            return [[] for _ in sequences]
        keeps = [keep for sequence in sequences for keep in self.encoded(sequence)]
        reduction = self.pruning.encoder
        with through_linear():
            features = iter(self._encoder(inputs, reduction, keeps, self.join, reader=id(self)))
        return [[next(features) for _ in sequence.prepared.image_inputs] for sequence in sequences]

    @property
    def join(self) -> Join | None:
        """What the method needs of the encoder's features beside them."""
        return self._contexts.join if self._contexts else None

    def release(self, prepared: Prepared) -> None:
        """Give back the features of images that were held for other engines."""
        self._encoder.release(prepared.image_inputs)

    def forget(self) -> None:
        """Give back the features of all images, where memory is short: they are made anew."""
        self._encoder.forget()
        self.prefixes.forget()

    def close(self) -> None:
        """Give back keys and values, recorded steps and features."""
        self.cache.release()
        self.graphs = None
        self.decoder.drop_copies()
        self.reset()

    def reset(self) -> None:
        """Begin without what was made of images, but for features that other engines may read."""
        self.prefixes.forget()
        if self._encodes_alone:
            self._encoder.forget()

    @property
    def encoded_so_far(self) -> tuple[int, float]:
        """Images that the encoder has read for all engines that share it, and seconds that engines
        were spared by each other."""
        return self._encoder.images, self._encoder.saved_s

    def encoded(self, sequence: SequenceState) -> list[int]:
        """Visual tokens of each of the sequence's images that enter the decoder."""
        counts = sequence.prepared.image_tokens
        return [self.pruning.encoded(count, self.num_layers) for count in counts]

    @torch.no_grad()
    def prefill(
        self,
        sequences: Sequence[SequenceState],
        features: Sequence[Sequence[Features]],
        ahead: Collection[bytes | None] = (),
    ) -> tuple[Tensor, float]:
        """Run the prompts of fresh sequences; returns logits [B, V] and the seconds of pruning.

        ahead: `SequenceState.prefix` of prompts that wait.
        """
        self.adapter.check_unchanged()
        if self.cache.rows.count == len(sequences):  # nobody else runs
            self.decoder.check_copies()
        prompts, comparing = self._packed(sequences, features), Stopwatch(self.decoder.device)
        ends = [spans[-1][1] if spans else 0 for spans in prompts.images]
        sharing = self.prefixes.plan(sequences, prompts.lengths, ends, ahead)
        prompts = replace(prompts, sharing=sharing)
        if self._contexts is not None and self._contexts.needed:
            with comparing.running():
                prompts = replace(prompts, contexts=self._contexts(sequences, features))
        done = prefill(
            self.decoder,
            prompts,
            self.pruning,
            self.cache.prefill([sequence.key for sequence in sequences]),
        )
        self.prefixes.done()
        for row, sequence in enumerate(sequences):
            sequence.layer_tokens = [lengths[row] for lengths in done.cache_lengths]
            sequence.positions = [done.next_positions[start][row] for start, _ in self.cache.spans]
            sequence.entered = entered(sequence.prepared.image_tokens, features[row])
            sequence.kept = [_by_source(stage, sequence.entered) for stage in done.kept[row]]
            sequence.scores = [
                before_reduction(scores_V, sequence.entered, sequence.visual_tokens).numpy()
                for scores_V in done.scores[row]
            ]
        return done.logits_BV, done.prune_seconds + comparing.seconds()

    def _packed(
        self, sequences: Sequence[SequenceState], features: Sequence[Sequence[Features]]
    ) -> PackedPrompts:
        """The sequences' prompts with as many placeholders as the encoder has left tokens."""
        lengths, spans = (
            tuple(t.prompt_tokens for t in sequences),
            tuple(t.spans for t in sequences),
        )
        images = [image for sequence in sequences for image in sequence.prepared.image_inputs]
        ids_T = torch.tensor(
            [token for sequence in sequences for token in sequence.prepared.input_ids]
        )
        positions_T = self.adapter.positions(lengths, spans, images)
        if self.pruning.encoder != "none":
            entry, whole_lengths = Entry.of(lengths, spans, features), lengths
            lengths, spans, ids_T = entry.lengths, entry.spans, ids_T[entry.index_T]
            positions_T = self._after_reduction(positions_T, whole_lengths, entry.index_T)
        own = list(chain.from_iterable(features))
        located = None
        if "coordinates" in self._needs:
            located = self._coordinates(images, own, lengths, spans)
        return PackedPrompts(
            embeds_TD=self.adapter.embed(ids_T, own),
            lengths=lengths,
            images=spans,
            positions_T=positions_T,
            coordinates_T2=located,
            injected=joined(own),
            given=[sequence.prepared.image_tokens for sequence in sequences],
            salts=Salts([sequence.prepared.input_ids for sequence in sequences]),
            explained=[row for row, one in enumerate(sequences) if one.prepared.explain],
        )

    def _coordinates(
        self,
        images: Sequence[Inputs],
        features: Sequence[Features],
        lengths: Sequence[int],
        spans: Sequence[Sequence[Span]],
    ) -> Tensor:
        """Of what is left of packed prompts with these images, `[T, 2]`."""
        given = (own for image in images for own in self.adapter.coordinates(image))
        return packed(lengths, spans, map(coordinates, given, features))

    def _after_reduction(
        self, positions_T: Tensor | None, lengths: Sequence[int], index_T: Tensor
    ) -> Tensor | None:
        """Positions of what is left, as after a stage in the decoder: numbered anew 0, 1, 2, ...,
        which is None, or each token's own."""
        if self.pruning.position_ids == "renumber":
            return None
        if positions_T is None:
            positions_T = contiguous_positions(lengths, torch.device("cpu"))
        return positions_T[..., index_T]

    def start(self, sequences: Sequence[SequenceState]) -> None:
        """Let sequences whose prompts and first tokens are there take part in decoding."""
        if not sequences:
            return
        self.cache.start(
            [sequence.key for sequence in sequences],
            [sequence.token_ids[-1] for sequence in sequences],
            [sequence.positions for sequence in sequences],
        )

    def decode(self) -> Tensor:
        """One more token of every running sequence, in the cache's order; returns logits [B, V].

        The tokens to feed lie in `cache.rows`; the caller puts the next ones there.
        """
        self.cache.extend()
        if self.graphs is None:
            return self._step(None)
        count = self.cache.rows.count
        rows = rounded_up(count, self.cache.rows.most)
        return self.graphs(self._step, rows, self.cache.generation)[:count]

    @torch.no_grad()
    def _step(self, rounded: int | None) -> Tensor:
        """Logits of the first `rounded` rows, or of just those of running sequences."""
        rows = self.cache.rows
        count = rows.count if rounded is None else rounded
        writer = self.cache.writer(rounded)
        hidden_BD = self.decoder.embed(rows.token_B[:count])
        with self.decoder.ragged():
            for group, (start, stop) in enumerate(self.cache.spans):
                rotary = self.decoder.rotary(rows.position_GB[group, :count])
                for layer in range(start, stop):
                    hidden_BD = self.decoder.run_layers(
                        layer, layer + 1, hidden_BD, rotary, writer.layout(layer), writer
                    )
            return self.decoder.head(hidden_BD)

    @torch.no_grad()
    def branch(
        self, sequences: Sequence[SequenceState], branches: Sequence[Sequence[Sequence[int]]]
    ) -> Tensor:
        """Hidden states that tokens behind stored prompts give, `[T, D]`, for `head`.

        Args:
            sequences: with their prompts in the cache; what follows is not stored.
            branches: of each sequence, the tokens of its continuations, which stand side by side.
        """
        device = self.decoder.device
        lengths = [[len(tokens) for tokens in own] for own in branches]
        layout = Branches.of(lengths, device)
        reader = self.cache.branches([sequence.key for sequence in sequences], layout)
        request_T = layout.request_T
        ids_T = torch.tensor([token for own in branches for tokens in own for token in tokens])
        ahead_T = sent(torch.cat([torch.arange(n) for own in lengths for n in own]), device)
        hidden_TD = self.decoder.embed(sent(ids_T, device))
        with self.decoder.ragged():
            for group, (start, stop) in enumerate(self.cache.spans):
                first_B = sent(torch.tensor([one.positions[group] for one in sequences]), device)
                rotary = self.decoder.rotary(first_B[request_T] + ahead_T)
                layout = reader.begin(group)
                hidden_TD = self.decoder.run_layers(start, stop, hidden_TD, rotary, layout, reader)
        return hidden_TD


def _boxes(adapter: Adapter, image: Inputs, count: int) -> Tensor:
    """`[count, 4]` of an image; NaN where an adapter does not give that: it may have inherited the
    boxes of a family and have tokens of its own, and answers do not depend on them."""
    try:
        (own_N4,) = adapter.boxes(image)
        if own_N4.shape == (count, 4):
            return own_N4
        why = f"they are of shape {list(own_N4.shape)}, and the image has {count} visual tokens"
    except Exception as error:  # an adapter may be anybody's
        why = kind_and_line(error)
    _say_without_boxes(type(adapter).__name__, why)
    return torch.full((count, 4), torch.nan)


@cache
def _say_without_boxes(adapter: str, why: str) -> None:
    _log.warning("explanations do not say where visual tokens lie: %s.boxes: %s", adapter, why)


def _by_source(stage: Sequence[int], sources: Sequence[int | None]) -> list[int | None]:
    return [sources[token] for token in stage] if sources else list(stage)
