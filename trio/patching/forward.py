"""Forward of a patched model: pruned prefill, then decoding on caches of different lengths.

Shapes: B rows, S padded prompt, T real tokens of all rows back to back, A axes of positions,
Q new tokens of a row, D hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import groupby
from operator import add
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from trio.decoder.attention import Padded
from trio.decoder.cache_argument import CACHE, cache_of
from trio.decoder.weights import how_to_mend
from trio.errors import UserError
from trio.families.adapter import Adapter, Span
from trio.families.coordinates import packed, unknown
from trio.patching.cache import RaggedLayer, make_plain, make_ragged, ragged_layers
from trio.patching.embeds import check_embeds
from trio.patching.override import Override
from trio.prefill import PackedPrompts, prefill
from trio.pruning.method_registry import needs_of
from trio.pruning.methods.random import Salts
from trio.pruning.options import Pruning

UNPATCH = "or call trio.unpatch(model) first"
_PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
"""By what a call brings each kind of visual tokens, unless encoded, in `mm_encoder_outputs`."""
_generating: ContextVar[tuple[nn.Module, Mapping[str, Any]] | None] = ContextVar(
    "_generating", default=None
)
"""A model whose `generate` is under way, and the call of it: of images that it encodes ahead of the
prefill, the sizes do not come there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompts:
    """Where the real tokens of a padded batch lie."""

    real_BS: Tensor
    """True at tokens, False at padding."""
    lengths: tuple[int, ...]
    """Real tokens of each row."""
    images: tuple[tuple[tuple[int, int], ...], ...]
    """Visual spans (start, stop) of each row, counted in its real tokens."""
    positions_T: Tensor | None
    """Positions [T], where they have one axis; None is 0, 1, 2, ... in each row."""
    coordinates_T2: Tensor | None
    """Where in its picture each token of an image lies [T, 2]; all alike in a video and where it is
    unknown. None where the choice does not ask."""
    salts: Sequence[int]
    """A number of each row's tokens, for method `random`."""


class PatchedForward(Override):
    """`forward` of the whole model: sees token ids, decides whether a call is a pruned prefill."""

    name = "forward"

    def __init__(self, model: nn.Module, pruning: Pruning, adapter: Adapter) -> None:
        super().__init__(model)
        self.pruning = pruning
        self.adapter = adapter

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = _by_name(self.original, args, kwargs)
        cache = cache_of(call)
        if self.pruning.active:
            self._check_embeds(call, cache)
            if cache is not None and cache.get_seq_length() > 0:
                self._refuse_new_images(call)
            else:
                if cache is not None and ragged_layers(cache):
                    make_plain(cache)
                if self._is_ours(call):
                    self.adapter.check_unchanged()
                    call["trio_prompts"] = self._prompts(call)
        return self.original(**call)

    def _check_embeds(self, call: dict[str, Any], cache: Any) -> None:
        """One vector on top of a filled cache is a decode step."""
        embeds = call.get("inputs_embeds")
        if embeds is None or _brought(call, self.adapter):
            return
        if cache is None or cache.get_seq_length() == 0 or embeds.shape[1] > 1:
            check_embeds(call, self.adapter.decoder.model.embed_tokens.weight)

    def _visual(self, call: dict[str, Any]) -> Tensor | None:
        """Which token ids stand for features [B, S], None if the call brings no image or video."""
        kinds = _brought(call, self.adapter)
        if not kinds:
            return None
        if call.get("input_ids") is None:
            raise UserError(
                "a patched model tells visual tokens from text by input_ids, got inputs_embeds: "
                f"pass input_ids and pixel_values, {UNPATCH}"
            )
        token_ids = [_token_id(self.adapter, kind) for kind in kinds]
        return torch.isin(call["input_ids"], torch.tensor(token_ids).to(call["input_ids"]))

    def _refuse_new_images(self, call: dict[str, Any]) -> None:
        visual_BS = self._visual(call)
        if visual_BS is not None and bool(visual_BS.any()):
            raise UserError(
                "images or videos on top of a filled cache cannot be pruned: generate from the "
                f"whole prompt without a cache, {UNPATCH}"
            )

    def _is_ours(self, call: dict[str, Any]) -> bool:
        visual_BS = self._visual(call)
        if visual_BS is not None and bool(visual_BS.any()):
            _check_prefill(call)
            _check_places_told(self.module, call)
            return True
        # transformers predicts a right-padded row's first token from its padding.
        mask = call.get("attention_mask")
        if not (isinstance(mask, Tensor) and mask.ndim == 2):
            return False
        padded_right = not bool(mask[:, -1].all())
        return padded_right and call.get("input_ids") is not None and _wants_last_logits(call)

    def _prompts(self, call: dict[str, Any]) -> Prompts:
        ids_BS: Tensor = call["input_ids"]
        mask = call.get("attention_mask")
        real_BS = torch.ones_like(ids_BS, dtype=torch.bool) if mask is None else mask.bool()
        real_BS = real_BS.to(ids_BS.device)
        lengths = tuple(int(n) for n in real_BS.sum(dim=1).tolist())
        if min(lengths) == 0:
            raise UserError(f"row {lengths.index(0)} of the batch is all padding: leave it out")
        tokens = [ids[real].tolist() for ids, real in zip(ids_BS, real_BS, strict=True)]
        pictures, videos = self._spans(call, tokens)
        images = tuple(tuple(sorted(own)) for own in map(add, pictures, videos))
        located = None
        if "coordinates" in needs_of(self.pruning):
            located = packed(lengths, pictures, self._coordinates(call, pictures))
        return Prompts(
            real_BS=real_BS,
            lengths=lengths,
            images=images,
            positions_T=self._positions(call, real_BS, lengths, images),
            coordinates_T2=located,
            salts=Salts(tokens),
        )

    def _positions(
        self,
        call: dict[str, Any],
        real_BS: Tensor,
        lengths: Sequence[int],
        images: Sequence[Sequence[tuple[int, int]]],
    ) -> Tensor | None:
        if self.adapter.decoder.position_axes > 1:
            return None  # the text decoder will get them
        _check_positions(call.get("position_ids"), real_BS)
        return self.adapter.positions(lengths, images, [call])

    def _spans(
        self, call: dict[str, Any], tokens: Sequence[Sequence[int]]
    ) -> tuple[list[list[Span]], list[list[Span]]]:
        """Spans of images in each row, and of videos. Images come in the order of rows, so many for
        each as its placeholders need, and so do videos."""
        counts = {kind: iter(self._counts(call, kind)) for kind in _brought(call, self.adapter)}
        pictures: list[list[Span]] = []
        videos: list[list[Span]] = []
        for row in tokens:
            pictures.append(self.adapter.spans(row, self._drawn(counts, "image", row)))
            shown = "video" in counts
            own = self._drawn(counts, "video", row) if shown else []
            videos.append(self.adapter.video_spans(row, own) if shown else [])
        return pictures, videos

    def _coordinates(
        self, call: dict[str, Any], pictures: Sequence[Sequence[Span]]
    ) -> Iterator[Tensor]:
        """Of each image, row by row, with spans as `_spans` tells them."""
        told, copies = self._told(call)
        given = iter(self.adapter.coordinates(told)) if told else iter(())
        for row in pictures[::copies]:
            own = []
            for start, stop in row:
                image_N2 = next(given, None)
                # Unknown of features that come alone, or are laid out otherwise than by the config.
                if image_N2 is None or len(image_N2) != stop - start:
                    image_N2 = unknown(stop - start)
                own.append(image_N2)
            yield from own * copies

    def _told(self, call: dict[str, Any]) -> tuple[Mapping[str, Any] | None, int]:
        """The call that brings the images of this one as pixels, and how many rows here each of its
        rows has become: beams and return sequences repeat it with its images."""
        if call.get(_PIXELS["image"]) is not None:
            return call, 1
        module, told = _generating.get() or (None, {})
        ids_BS, own_BS = _ids(told), call["input_ids"]
        if module is not self.module or told.get(_PIXELS["image"]) is None or ids_BS is None:
            return None, 1
        # Others may call the model while it generates, as a logits processor can.
        copies = max(1, len(own_BS) // len(ids_BS))
        same = torch.equal(ids_BS.repeat_interleave(copies, dim=0).to(own_BS), own_BS)
        return (told, copies) if same else (None, 1)

    def _drawn(self, counts: dict[str, Iterator[int]], kind: str, row: Sequence[int]) -> list[int]:
        """Visual tokens of each image, or video, of a row, taken off the front."""
        needed = row.count(_token_id(self.adapter, kind))
        own: list[int] = []
        while sum(own) < needed and (count := next(counts.get(kind, iter(())), None)) is not None:
            own.append(count)
        return own

    def _counts(self, call: dict[str, Any], kind: str) -> list[int]:
        """Visual tokens of each image, or video, of the batch."""
        return _counts_of(self.adapter, call, kind)


class PatchedDecoder(Override):
    """`forward` of the text decoder: sees merged embeddings, runs what `PatchedForward` decided."""

    name = "forward"

    def __init__(self, text_model: nn.Module, pruning: Pruning, adapter: Adapter) -> None:
        super().__init__(text_model)
        self.pruning = pruning
        self.adapter = adapter

    @torch.compiler.disable
    def __call__(self, *args: Any, trio_prompts: Prompts | None = None, **kwargs: Any) -> Any:
        call = _by_name(self.original, args, kwargs)
        cache = cache_of(call)
        layers = ragged_layers(cache)
        if trio_prompts is None and not layers:
            return self.original(**call)
        for name in ("output_attentions", "output_hidden_states"):
            wanted = call.get(name)
            if getattr(self.adapter.decoder.config, name, False) if wanted is None else wanted:
                raise UserError(
                    f"{name}: a pruned prompt has none for the tokens that left: leave it out, "
                    f"{UNPATCH}"
                )
        hidden = call.get("inputs_embeds")
        if hidden is None:
            hidden = self.adapter.decoder.embed(call["input_ids"])
        if trio_prompts is None:
            last = self._decode(hidden, call.get("attention_mask"), layers)
        else:
            cache = DynamicCache() if cache is None else cache
            positions_T = self._positions(call.get("position_ids"), trio_prompts)
            injected = self.adapter.injected(call)
            last = self._prefill(hidden, trio_prompts, positions_T, injected, cache)
        returned: Any = {CACHE: cache}
        return BaseModelOutputWithPast(last_hidden_state=last, **returned)

    def _positions(self, given: Tensor | None, prompts: Prompts) -> Tensor | None:
        """Of the real tokens, [T] or [A, T]; None is 0, 1, 2, ... in each row.

        Those on several axes are what `generate` or the model has worked out, of any images and
        videos.
        """
        axes = self.adapter.decoder.position_axes
        if axes == 1:
            return prompts.positions_T
        if given is None:
            if any(prompts.images):
                raise UserError(
                    "images or videos whose rows and columns the model does not find: pass on all "
                    f"that its own processor returns, or position_ids, {UNPATCH}"
                )
            return None
        # Those that a text would have may come before them.
        own = given[-axes:] if given.ndim == 3 else given
        real_BS = prompts.real_BS.to(given.device)
        return own.expand(*own.shape[:-2], *real_BS.shape)[..., real_BS]

    def _prefill(
        self,
        embeds_BSD: Tensor,
        prompts: Prompts,
        positions_T: Tensor | None,
        injected: Sequence[Tensor],
        cache: Cache,
    ) -> Tensor:
        """Fills the cache; final-normed hidden state of each row's last token [B, 1, D]."""
        self._check_window(max(prompts.lengths))
        layers = make_ragged(cache, self.adapter.decoder.num_layers)
        try:
            # Saliency takes gradients, which inference mode rules out for good.
            with torch.inference_mode(False), torch.no_grad():
                return self._fill(embeds_BSD, prompts, positions_T, injected, layers)[:, None]
        except BaseException:
            make_plain(cache)
            raise

    def _fill(
        self,
        embeds_BSD: Tensor,
        prompts: Prompts,
        positions_T: Tensor | None,
        injected: Sequence[Tensor],
        layers: list[RaggedLayer],
    ) -> Tensor:
        decoder = self.adapter.decoder
        if embeds_BSD.is_inference():
            embeds_BSD = embeds_BSD.clone()
        entering = PackedPrompts(
            embeds_TD=embeds_BSD[prompts.real_BS.to(embeds_BSD.device)],
            lengths=prompts.lengths,
            images=prompts.images,
            positions_T=positions_T,
            coordinates_T2=prompts.coordinates_T2,
            injected=injected,
            salts=prompts.salts,
        )
        store = _Store(layers)
        done = prefill(decoder, entering, self.pruning, store)
        _check_finite(done.finite_B, decoder.dtype)
        for index, layer in enumerate(layers):
            layer.place(done.next_positions[index], embeds_BSD.shape[1], store.groups[index])
        return decoder.model.norm(done.hidden_BD)

    def _check_window(self, tokens: int) -> None:
        decoder = self.adapter.decoder
        window = decoder.max_positions
        if window < decoder.config.max_position_embeddings and tokens > window:
            raise UserError(
                f"{tokens} tokens reach over the decoder's sliding window of {window}, which "
                f"pruned rows do not have: shorten the prompt or max_new_tokens, {UNPATCH}"
            )

    @torch.no_grad()
    def _decode(self, embeds_BQD: Tensor, mask: Tensor | None, layers: list[RaggedLayer]) -> Tensor:
        """New tokens one after another; final-normed hidden states [B, Q, D].

        A padded column repeats the row's token before it, so the last column is always a token.
        """
        rows, width = embeds_BQD.shape[:2]
        if rows != layers[0].lengths_B.shape[0]:
            raise UserError(
                f"the cache holds {layers[0].lengths_B.shape[0]} rows and the call brings {rows}: "
                "use the batch, num_beams and num_return_sequences of the call that filled it"
            )
        self._check_window(layers[0].longest + width)
        if mask is None:
            active_BQ = torch.ones(rows, width, dtype=torch.long, device=embeds_BQD.device)
        else:
            active_BQ = mask[:, -width:].to(embeds_BQD.device, torch.long)
        hidden = [self._step(embeds_BQD[:, 0], active_BQ[:, 0], layers)]
        for column in range(1, width):
            active_B = active_BQ[:, column]
            step_BD = self._step(embeds_BQD[:, column], active_B, layers)
            hidden.append(torch.where(active_B.bool()[:, None], step_BD, hidden[-1]))
        return torch.stack(hidden, dim=1)

    def _step(self, hidden_BD: Tensor, active_B: Tensor, layers: list[RaggedLayer]) -> Tensor:
        """One token of each row through all layers; final-normed hidden states [B, D]."""
        decoder = self.adapter.decoder
        store = _Append(layers)
        start = 0
        with decoder.ragged():
            for _, members in groupby(layers, key=lambda layer: layer.group):
                group = list(members)
                stop = start + len(group)
                lengths_B, positions_B = group[0].lengths_B, group[0].positions_B
                rotary = decoder.rotary(positions_B)
                layout = Padded(lengths_B + 1)
                hidden_BD = decoder.run_layers(start, stop, hidden_BD, rotary, layout, store)
                for layer in group:
                    layer.advance(lengths_B + active_B, positions_B + active_B)
                start = stop
        return decoder.model.norm(hidden_BD)


class PatchedGenerate(Override):
    """`generate`, which alone knows whether a prompt will come in pieces or with guessed tokens."""

    name = "generate"

    def __init__(self, model: nn.Module, pruning: Pruning, adapter: Adapter) -> None:
        super().__init__(model)
        self.pruning = pruning
        self.adapter = adapter

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = _by_name(self.original, args, kwargs)
        kinds = _brought(call, self.adapter) if self.pruning.active else []
        if self.pruning.active and call.get("inputs_embeds") is not None:
            _check_no_placeholders(self.adapter, call)
        if kinds:
            self._check_whole_prompt(call)
            self._check_order(call)
            _check_places_told(self.module, call)
            for kind in kinds:
                if call.get(_PIXELS[kind]) is not None:
                    _counts(self.adapter, call, kind)  # says what is missing, if anything is
        token = _generating.set((self.module, call))
        try:
            return self.original(**call)
        finally:
            _generating.reset(token)

    def _given(self, call: dict[str, Any], name: str) -> Any:
        configs = (call.get("generation_config"), getattr(self.module, "generation_config", None))
        values = [call.get(name), *(getattr(config, name, None) for config in configs)]
        return next((value for value in values if value is not None), None)

    def _check_whole_prompt(self, call: dict[str, Any]) -> None:
        for name in ("prefill_chunk_size", "prompt_lookup_num_tokens", "assistant_model"):
            if self._given(call, name) is not None:
                raise UserError(
                    f"{name}: a prompt is pruned as a whole, by what its end asks for, and nothing "
                    f"guessed behind it: leave it out, {UNPATCH}"
                )

    def _check_order(self, call: dict[str, Any]) -> None:
        if repeats_by_prompt(self.module):
            return
        ids_BS = _ids(call)
        copies = [self._given(call, name) or 1 for name in ("num_beams", "num_return_sequences")]
        if ids_BS is None or max(copies) == 1:
            return
        for kind in _brought(call, self.adapter):
            prompts = int((ids_BS == _token_id(self.adapter, kind)).any(dim=1).sum())
            if len(_counts_of(self.adapter, call, kind)) > prompts:
                raise UserError(
                    f"transformers {transformers.__version__} mixes up the {kind}s of a prompt "
                    "that has several under num_beams or num_return_sequences: upgrade it, or "
                    "generate one sequence a prompt"
                )


class _Store:
    """The cache as prefill sees it: packed keys of each layer, once."""

    def __init__(self, layers: list[RaggedLayer]) -> None:
        self._layers = layers
        self._lengths: Sequence[int] = ()
        self.groups = [0] * len(layers)

    def begin_prefill(self, first_layer: int, lengths: Sequence[int]) -> None:
        self._lengths = lengths
        self.groups[first_layer:] = [first_layer] * (len(self.groups) - first_layer)

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self._layers[layer_idx].store(key, value, self._lengths)
        return key, value


class _Append:
    """The cache as a decode step sees it: one token for each row."""

    def __init__(self, layers: list[RaggedLayer]) -> None:
        self._layers = layers

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return self._layers[layer_idx].append(key, value)


def _by_name(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    if not args:
        return kwargs
    names = list(inspect.signature(function).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _ids(call: Mapping[str, Any]) -> Any:
    """Token ids of a call of `generate`; None if it has none."""
    named = call.get("input_ids")
    return call.get("inputs") if named is None else named


def _brought(call: dict[str, Any], adapter: Adapter) -> list[str]:
    """Kinds of visual tokens that the call brings, as pixels or encoded."""
    encoded = call.get("mm_encoder_outputs") or {}
    kinds = [
        kind
        for kind, pixels in _PIXELS.items()
        if call.get(pixels) is not None or encoded.get(kind) is not None
    ]
    if "video" in kinds and adapter.video_token_id is None:
        raise UserError(
            "videos are not pruned in this family: generate from images, which may be frames, and "
            f"text, {UNPATCH}"
        )
    return kinds


def _counts(adapter: Adapter, call: dict[str, Any], kind: str) -> list[int]:
    """Visual tokens of each image, or video, that the call brings as pixels."""
    return adapter.video_tokens(call) if kind == "video" else adapter.visual_tokens(call)


def _counts_of(adapter: Adapter, call: dict[str, Any], kind: str) -> list[int]:
    """As `_counts`, or of what is encoded already."""
    encoded = (call.get("mm_encoder_outputs") or {}).get(kind)
    if encoded is not None:
        return [len(features) for features in encoded.pooler_output]
    return _counts(adapter, call, kind)


def repeats_by_prompt(model: nn.Module) -> bool:
    """Whether `generate` repeats the images and videos of a prompt together for beams and return
    sequences. Else each comes by itself several times, and a prompt gets its first image twice: so
    before transformers encoded images ahead of the prefill, and in 5.18, when it had begun to."""
    if "mm_encoder_outputs" in inspect.signature(model.forward).parameters:
        return not transformers.__version__.startswith("5.18.")
    # A family's own way of repeating images, which knows the prompt of each.
    return "_expand_inputs_for_generation" in vars(type(model))


def _token_id(adapter: Adapter, kind: str) -> int | None:
    return adapter.video_token_id if kind == "video" else adapter.image_token_id


def _check_no_placeholders(adapter: Adapter, call: Mapping[str, Any]) -> None:
    ids_BS = _ids(call)
    kinds = [i for i in (adapter.image_token_id, adapter.video_token_id) if i is not None]
    if ids_BS is not None and any(bool((ids_BS == kind).any()) for kind in kinds):
        raise UserError(
            "inputs_embeds beside input_ids with placeholders of images or videos: a patched model "
            f"prunes what it encodes itself; pass input_ids and pixel_values alone, {UNPATCH}"
        )


def _wants_last_logits(call: dict[str, Any]) -> bool:
    """Whether the call is what `generate` makes of a prompt."""
    keep = call.get("logits_to_keep")
    return isinstance(keep, int) and keep == 1 and call.get("use_cache") is not False


def _check_prefill(call: dict[str, Any]) -> None:
    if call.get("labels") is not None:
        raise UserError(f"labels: a pruned prompt has no loss; leave them out, {UNPATCH}")
    if call.get("use_cache") is False:
        raise UserError(f"use_cache=False would prune anew at every token: leave it out, {UNPATCH}")
    if not _wants_last_logits(call):
        raise UserError(
            "a pruned prompt has logits for its last token only: use model.generate, call "
            f"model(..., logits_to_keep=1), {UNPATCH}"
        )
    mask = call.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        given = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise UserError(
            f"attention_mask must be [rows, tokens] to be pruned, got {given}: use a DynamicCache "
            f"and a 2-dimensional mask, {UNPATCH}"
        )


def _check_places_told(model: nn.Module, call: dict[str, Any]) -> None:
    """Without knowing which tokens are an image's, `generate` of a model with M-RoPE numbers them
    like words, and says nothing."""
    told = call.get("mm_token_type_ids") is not None or call.get("position_ids") is not None
    if not told and "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        raise UserError(
            "images or videos without mm_token_type_ids, by which the model finds their rows and "
            "columns: pass on all that its own processor returns"
        )


def _check_finite(finite_B: Tensor, dtype: torch.dtype) -> None:
    bad = (~finite_B).nonzero()[:, 0].tolist()
    if bad:
        raise UserError(
            f"row {bad[0]} of the batch has hidden states or saliency that are not finite (NaN or "
            f"infinity), so its tokens cannot be chosen: {how_to_mend(dtype)}"
        )


def _check_positions(positions: Tensor | None, real_BS: Tensor) -> None:
    if positions is None:
        return
    counted_BS = real_BS.cumsum(dim=1) - 1
    plain_BS = torch.arange(real_BS.shape[1], device=real_BS.device)
    given_BS = positions.to(real_BS.device).expand_as(counted_BS)
    wanted = [(given_BS == usual)[real_BS].all() for usual in (counted_BS, plain_BS)]
    if not any(bool(same) for same in wanted):
        raise UserError(f"position_ids of one's own cannot be pruned: leave them out, {UNPATCH}")
