"""Packed prefill: prompts of different lengths back to back, visual tokens pruned on the way.

Shapes: T packed tokens, T' what is left of them after a stage, A axes of positions, B requests,
D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from trio.decoder.attention import Packed
from trio.decoder.decoder import Decoder, LayerCache
from trio.decoder.gpu import sent
from trio.decoder.stopwatch import Stopwatch
from trio.errors import UserError
from trio.families.coordinates import unknown
from trio.pruning.batch import (
    Ragged,
    compact,
    contiguous_positions,
    nothing_if_finite,
)
from trio.pruning.kept import Kept, Left, Scored
from trio.pruning.method import Choice, Context, Method, Stage, choose, goals_of
from trio.pruning.method_registry import create
from trio.pruning.options import Pruning
from trio.shared_prefix import Sharing
from trio.shared_prefix import run as run_shared


class PrefillCache(LayerCache, Protocol):
    """A cache that is told how the packed keys it is about to get divide into requests."""

    def begin_prefill(self, first_layer: int, lengths: tuple[int, ...]) -> None:
        """From `first_layer` on, until the next call, keys come as `[1, K, sum(lengths), E]`."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedPrompts:
    """What enters the decoder."""

    embeds_TD: Tensor
    """Text embeddings and visual features of all requests, in order."""
    lengths: tuple[int, ...]
    """Tokens of each request."""
    images: Sequence[Sequence[tuple[int, int]]]
    """For each request the visual spans `(start, stop)` in its own coordinates; one span is one
    image, or one run of a video's tokens, with its own budget."""
    positions_T: Tensor | None = None
    """Positions `[T]`, or `[A, T]` where they differ by axis; None is 0, 1, 2, ... in each request.
    A request goes on behind the largest of its own."""
    coordinates_T2: Tensor | None = None
    """Where in its picture each visual token lies, as of `trio.families.coordinates`. None is
    unknown."""
    injected: Sequence[Tensor] = ()
    """For each of the first layers what is added to the hidden states of visual tokens that leave
    it, `[V, D]`, where V counts those of all requests in order."""
    given: Sequence[Sequence[int]] = ()
    """For each request the visual tokens that the encoder gave of each image before it reduced
    them, for the schedule; empty where it did not."""
    salts: Sequence[int] = ()
    """A number per request that depends on that request alone, to seed randomness
    (`trio.pruning.methods.random.salt_of(token_ids)`); empty means 0 for all."""
    explained: Collection[int] = ()
    """Requests of which the scores that their tokens were chosen by are wanted."""
    contexts: Sequence[Sequence[Context]] = ()
    """For methods that need `text_tower` or `instruction`, what encoder and prompt tell of each
    request's images."""
    sharing: Sharing | None = None
    """How the first layers are shared by prompts that begin alike, no further than `shared_depth`;
    None runs them for each."""

    def __post_init__(self) -> None:
        assert sum(self.lengths) == self.embeds_TD.shape[0]
        assert len(self.images) == len(self.lengths) and all(n > 0 for n in self.lengths)
        assert self.positions_T is None or self.positions_T.shape[-1] == len(self.embeds_TD)
        assert self.coordinates_T2 is None or len(self.coordinates_T2) == len(self.embeds_TD)
        assert not self.salts or len(self.salts) == len(self.lengths)
        assert not self.contexts or list(map(len, self.contexts)) == list(map(len, self.images))
        for length, spans in zip(self.lengths, self.images, strict=True):
            edges = [edge for span in spans for edge in span]
            assert edges == sorted(edges) and all(start < stop for start, stop in spans)
            assert not edges or 0 <= edges[0] <= edges[-1] <= length


@dataclass(frozen=True, kw_only=True, slots=True)
class Prefilled:
    """What the prefill gives back."""

    hidden_BD: Tensor
    """Last position of each request, before the final norm."""
    logits_BV: Tensor
    """Logits there, for the first new token."""
    cache_lengths: list[list[int]]
    """`[layer][request]`, keys that the layer holds."""
    next_positions: list[list[int]]
    """`[layer][request]`, position of the next token in that layer."""
    kept: list[list[list[int]]]
    """`[request][stage]`, visual tokens left, numbered as they entered."""
    visual_tokens_stages: list[list[int]]
    """`[request][stage]`, how many those are."""
    scores: list[list[Tensor]]
    """`[request][stage]`, what the visual tokens were chosen by, numbered as they entered: float32
    on the CPU, NaN for those that were gone or whose image lost none. Empty for requests that do
    not ask for it, and where the method has no scores."""
    prune_seconds: float
    """Time in scoring, choosing and compacting, all requests together."""
    finite_B: Tensor
    """Whether all that a request's tokens were chosen by at its stages is finite; where not, its
    hidden states and logits here are NaN."""


@dataclass(slots=True)
class StageTrace:
    """One stage as it was: hidden states and positions, packed, before and after."""

    layer: int
    before: Ragged
    hidden_in_TD: Tensor
    positions_in_T: Tensor
    choice: Choice | None
    after: Ragged
    hidden_out_TD: Tensor
    positions_out_T: Tensor


@dataclass(slots=True)
class Trace:
    """Everything a replay compares; filled by `prefill` when given."""

    stages: list[StageTrace] = field(default_factory=list)
    hidden_TD: Tensor | None = None


def prefill(
    decoder: Decoder,
    prompts: PackedPrompts,
    pruning: Pruning | None,
    cache: PrefillCache | None,
    *,
    trace: Trace | None = None,
) -> Prefilled:
    """Run the prompts through the decoder and prune at the stages of each.

    Args:
        decoder: the model's decoder.
        prompts: packed prompts.
        pruning: settings; None prunes nothing. `position_ids` None counts as `renumber`.
        cache: gets every layer's keys and values; None stores nothing.
        trace: filled with the tensors around each stage.

    Raises:
        UserError: the retention is out of reach for a prompt, a stage is too deep, or the method
            needs something that the prompts do not bring.
    """
    with torch.no_grad(), decoder.ragged():
        return _Prefill(decoder, prompts, pruning or Pruning(), cache, trace).result()


class _Prefill:
    """One prefill under way."""

    def __init__(
        self,
        decoder: Decoder,
        prompts: PackedPrompts,
        pruning: Pruning,
        cache: PrefillCache | None,
        trace: Trace | None,
    ) -> None:
        self.decoder = decoder
        self.pruning = pruning
        self.cache = cache
        self.trace = trace
        self.salts = prompts.salts or (0,) * len(prompts.lengths)
        self.contexts = prompts.contexts
        self.explained = frozenset(prompts.explained)
        self.hidden_TD = prompts.embeds_TD
        self.entered_TD: Tensor | None = None
        self.injected = prompts.injected
        self.sharing = prompts.sharing
        _check_injected(prompts)
        self.ragged = Ragged.of_spans(prompts.lengths, prompts.images)
        self.given = prompts.given or [
            [image.count for image in images] for images in self.ragged.images
        ]
        if prompts.positions_T is None:
            self.positions_T = contiguous_positions(prompts.lengths, decoder.device)
            self.next_positions = list(prompts.lengths)
        else:
            self.positions_T = sent(prompts.positions_T, decoder.device)
            self.next_positions = _next_positions(prompts.positions_T, prompts.lengths)
        coordinates_T2 = prompts.coordinates_T2
        if coordinates_T2 is None:
            coordinates_T2 = unknown(len(prompts.embeds_TD))
        self.coordinates_T2 = sent(coordinates_T2, decoder.device)
        visual = self.ragged.visual()
        token_T = torch.full((len(prompts.embeds_TD),), -1)
        token_T[visual] = torch.arange(len(visual))
        # Of each token its request, and if it is visual its number over all that the encoder gave.
        self.marks_2T = sent(torch.stack([self.ragged.request_T(), token_T]), decoder.device)
        given = (self.ragged.visual_tokens(request) for request in range(len(prompts.lengths)))
        self.first_tokens = list(accumulate(given, initial=0))
        self.left: list[Left] = []
        # NaN where something is not finite.
        self.trouble_B = torch.zeros(
            len(prompts.lengths), dtype=decoder.dtype, device=decoder.device
        )
        self.pruning_time = Stopwatch(decoder.device)

    def result(self) -> Prefilled:
        keeps = self._keeps_by_layer()
        self.begins = {0, *keeps}
        method = create(self.pruning) if keeps else None
        looks_back = method is not None and "attention" in method.needs
        start = self._share()
        lengths = [list(self.ragged.lengths)] * start
        positions = [list(self.next_positions)] * start
        for stop in sorted({*keeps, self.decoder.num_layers}):
            self._run(start, stop, stop - 1 if looks_back and stop in keeps else None)
            if stop == 0 and looks_back:
                self.entered_TD = self.hidden_TD
            lengths += [list(self.ragged.lengths)] * (stop - start)
            positions += [list(self.next_positions)] * (stop - start)
            if method is not None and stop in keeps:
                self._prune(method, stop, keeps[stop])
            start = stop
        kept = Kept(self.left, self.first_tokens)
        last = torch.tensor([end - 1 for end in accumulate(self.ragged.lengths)])
        hidden_BD = self.hidden_TD[sent(last, self.hidden_TD.device)]
        # Tokens that are gone by a choice that was none would leave no trace.
        hidden_BD = hidden_BD + self.trouble_B[:, None]
        if self.trace is not None:
            self.trace.hidden_TD = self.hidden_TD
        logits_BV = self.decoder.head(hidden_BD)
        by_request = kept.by_request(len(self.ragged.lengths))
        return Prefilled(
            hidden_BD=hidden_BD,
            logits_BV=logits_BV,
            cache_lengths=lengths,
            next_positions=positions,
            kept=by_request,
            visual_tokens_stages=[[len(stage) for stage in stages] for stages in by_request],
            scores=kept.scores(len(self.ragged.lengths), self.explained),
            prune_seconds=self.pruning_time.seconds(),
            finite_B=self.trouble_B == 0,
        )

    def _keeps_by_layer(self) -> dict[int, list[list[int] | None]]:
        """`{layer: [request] -> tokens to keep of each image}`; None has no stage there."""
        keeps: dict[int, list[list[int] | None]] = {}
        requests = len(self.ragged.lengths)
        for request, counts in enumerate(self.given):
            for count in counts:
                for layer, keep in self.pruning.stages(count, self.decoder.num_layers):
                    row = keeps.setdefault(layer, [None] * requests)
                    row[request] = [*(row[request] or []), keep]
        return keeps

    def _share(self) -> int:
        """Runs the layers that prompts share; returns how many these are."""
        if self.sharing is None:
            return 0
        if self.cache is not None:
            self.cache.begin_prefill(0, self.ragged.lengths)
        self.hidden_TD = run_shared(
            self.decoder,
            self.sharing,
            self.hidden_TD,
            self.positions_T,
            self.ragged.lengths,
            self.cache,
            self._inject,
        )
        return self.sharing.depth

    def _inject(self, layer: int, hidden_TD: Tensor, index_T: Tensor) -> None:
        """Into some of the packed tokens, by their indices."""
        if layer >= len(self.injected):
            return
        # Nothing was dropped yet: visual tokens are numbered as they stand.
        place_T = torch.full((sum(self.ragged.lengths),), -1)
        place_T[index_T] = torch.arange(len(index_T))
        place_V = place_T[self.ragged.visual()]
        encoded = (place_V >= 0).nonzero()[:, 0]
        packed, encoded = (sent(x, hidden_TD.device) for x in (place_V[encoded], encoded))
        hidden_TD.index_add_(0, packed, self.injected[layer][encoded].to(hidden_TD))

    def _run(self, start: int, stop: int, looked_at: int | None) -> None:
        """Layers `start … stop-1`; holds on to what enters the one that will be looked at."""
        if stop == start:
            return
        if self.cache is not None and start in self.begins:
            self.cache.begin_prefill(start, self.ragged.lengths)
        rotary = self.decoder.rotary(self.positions_T)
        layout = Packed(self.ragged.lengths)
        if self.injected[start:stop]:
            packed = sent(self.ragged.visual(), self.decoder.device)
            encoded = self.marks_2T[1, packed]
        for layer in range(start, stop):
            if layer == looked_at:
                self.entered_TD = self.hidden_TD
            self.hidden_TD = self.decoder.run_layers(
                layer, layer + 1, self.hidden_TD, rotary, layout, self.cache
            )
            if layer < len(self.injected):
                # To each visual token that is still here what the encoder has for it.
                own_VD = self.injected[layer][encoded]
                self.hidden_TD.index_add_(0, packed, own_VD.to(self.hidden_TD))

    def _prune(self, method: Method, layer: int, keeps: list[list[int] | None]) -> None:
        hidden_in, positions_in, before = self.hidden_TD, self.positions_T, self.ragged
        with self.pruning_time.running():
            self._check(hidden_in)
            choice = choose(method, self._stage(layer, keeps))
            self.entered_TD = None
            scored = None
            if choice is not None:
                scored = self._scored(choice) if choice.scores else None
                self._compact(choice)
            self._renumber(keeps)
            had = [request for request, keep in enumerate(keeps) if keep is not None]
            self.left.append(Left(self.ragged, self.marks_2T[1], had, scored))
        if self.trace is not None:
            self.trace.stages.append(
                StageTrace(
                    layer,
                    before,
                    hidden_in,
                    positions_in,
                    choice,
                    self.ragged,
                    self.hidden_TD,
                    self.positions_T,
                )
            )

    def _stage(self, layer: int, keeps: list[list[int] | None]) -> Stage:
        return Stage(
            decoder=self.decoder,
            layer=layer,
            hidden_TD=self.hidden_TD,
            positions_T=self.positions_T,
            coordinates_T2=self.coordinates_T2,
            batch=self.ragged,
            goals=goals_of(self.ragged, keeps),
            salts=self.salts,
            entered_TD=self.entered_TD,
            contexts=self.contexts,
            explained=self.explained,
        )

    def _scored(self, choice: Choice) -> Scored:
        """What tokens are chosen by, before those that are not chosen leave the batch."""
        spans = []
        for request, number in choice.scores:
            image, first = self.ragged.images[request][number], self.ragged.starts[request]
            spans.append(slice(first + image.start, first + image.start + image.count))
        return Scored(
            requests=[request for request, _ in choice.scores],
            counts=[len(own_V) for own_V in choice.scores.values()],
            token_S=torch.cat([self.marks_2T[1, span] for span in spans]),
            score_S=torch.cat(
                [
                    sent(own_V, self.decoder.device, torch.float32)
                    for own_V in choice.scores.values()
                ]
            ),
        )

    def _compact(self, choice: Choice) -> None:
        if choice.finite_B is not None:
            self.trouble_B.masked_fill_(~choice.finite_B, torch.nan)
        self.ragged, index_T = compact(self.ragged, choice.goals, choice.kept_NK)
        self.hidden_TD = self.hidden_TD[index_T]
        self.positions_T = self.positions_T[..., index_T]
        self.coordinates_T2 = self.coordinates_T2[index_T]
        self.marks_2T = self.marks_2T[:, index_T]

    def _check(self, hidden_TD: Tensor) -> None:
        """Note the requests of which a token is not finite, before it may be dropped."""
        self.trouble_B.index_add_(0, self.marks_2T[0], nothing_if_finite(hidden_TD))

    def _renumber(self, keeps: list[list[int] | None]) -> None:
        """Requests with a stage here count on from 0, also where it removed nothing."""
        if self.pruning.position_ids == "keep":
            return
        lengths = self.ragged.lengths
        fresh = contiguous_positions(lengths, self.positions_T.device)
        touched = torch.tensor([keep is not None for keep in keeps])
        if touched.all():
            self.positions_T = fresh.expand_as(self.positions_T)
        else:
            mask = sent(touched.repeat_interleave(torch.tensor(lengths)), fresh.device)
            self.positions_T = torch.where(mask, fresh, self.positions_T)
        self.next_positions = [
            length if keep is not None else position
            for length, keep, position in zip(lengths, keeps, self.next_positions, strict=True)
        ]


def shared_depth(pruning: Pruning, tokens: int, num_layers: int) -> int:
    """Layers whose states of an image do not depend on what stands behind it in a prompt: those
    before the first stage, without the one that this looks back at.

    tokens: visual tokens of an image of the model.
    """
    first = min((layer for layer, _ in pruning.stages(tokens, num_layers)), default=num_layers)
    looks_back = pruning.chooses and "attention" in create(pruning).needs
    return max(0, first - looks_back)


def _check_injected(prompts: PackedPrompts) -> None:
    visual = sum(stop - start for spans in prompts.images for start, stop in spans)
    for layer_VD in prompts.injected:
        if len(layer_VD) != visual:
            raise UserError(
                f"{len(layer_VD)} features are to be added to {visual} visual tokens in the first "
                "layers: images were repeated or left out on the way; upgrade transformers"
            )


def _next_positions(positions_T: Tensor, lengths: Sequence[int]) -> list[int]:
    largest = [own.amax() for own in positions_T.split(list(lengths), dim=-1)]
    return [position + 1 for position in torch.stack(largest).tolist()]
