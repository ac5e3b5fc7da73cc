"""What an engine counts, what reading a prompt costs, and a sequence's result. Loads no torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from trio.engine.request import Explanation, Prepared, Result, failed
from trio.pruning.flops import DecoderShape, layer_average
from trio.pruning.method_registry import create

if TYPE_CHECKING:
    from trio.engine.sequence import SequenceState
    from trio.families.adapter import Adapter
    from trio.families.text_tower import TextTower
    from trio.pruning.options import Pruning


@dataclass(slots=True)
class Counters:
    """Sums and peaks since the last reset; seconds are wall time of the engine's own thread."""

    requests: int = 0
    failed: int = 0
    images: int = 0
    """Like the tokens of prompts and answers, of `requests`, and once for each of them."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    candidate_tokens: int = 0
    images_encoded: int = 0
    """Images that the encoder read: not those whose features were there from another prompt, or
    from another engine."""
    image_layers: int = 0
    """Layers before the first stage, counted for each image whose tokens went through them."""
    shared_prompts: int = 0
    """Prompts that took over what these layers had made of their image for another one."""
    encode_s: float = 0.0
    """As if this engine were alone, where several share an encoder."""
    encode_saved_s: float = 0.0
    """Of these, what another engine's reading of the same images has spared."""
    prefill_s: float = 0.0
    """Prefill without encoding; pruning included, and scoring of candidates."""
    score_s: float = 0.0
    """Of candidates, behind the prefill of their prompts."""
    prune_s: float = 0.0
    decode_s: float = 0.0
    idle_s: float = 0.0
    """Between steps, with nothing to do."""
    decode_steps: int = 0
    decode_rows: int = 0
    """Running requests, summed over decode steps."""
    kv_used_bytes_peak: int = 0
    out_of_memory: int = 0
    """Times that the device ran out of memory."""

    def as_dict(self) -> dict[str, Any]:
        """All counters, and the mean number of requests that ran together in a decode step."""
        running = self.decode_rows / self.decode_steps if self.decode_steps else None
        return {**asdict(self), "running_mean": running}


def choosing_flops(
    shape: DecoderShape, pruning: Pruning, image_tokens: Sequence[int], prompt_tokens: int
) -> int:
    """Scoring and choosing at all stages of a prompt.

    Args:
        image_tokens: that the encoder gave for each image.
        prompt_tokens: of text.
    """
    if not pruning.chooses:
        return 0
    method = create(pruning)
    layers = shape.num_layers
    stages = [dict(pruning.stages(count, layers)) for count in image_tokens]
    flops, left = 0, [pruning.encoded(count, layers) for count in image_tokens]
    for layer in sorted({layer for own in stages for layer in own}):
        keeps = [own.get(layer, now) for own, now in zip(stages, left, strict=True)]
        if keeps == left:
            continue
        tokens = sum(left) + prompt_tokens
        pairs = zip(left, keeps, strict=True)
        losing = [(count, keep) for count, keep in pairs if keep < count]
        flops += method.flops(shape, tokens, losing)
        left = keeps
    return flops


def encoder_flops(
    adapter: Adapter, pruning: Pruning, prepared: Prepared, text_tower: TextTower | None = None
) -> int:
    """Of all images of a prompt, reduced if the settings say so, and of the text tower.

    Args:
        pruning: settled.
        text_tower: where it takes part.
    """
    flops = 0
    for count, inputs in zip(prepared.image_tokens, prepared.image_inputs, strict=True):
        left = pruning.encoded(count, adapter.decoder.num_layers)
        if pruning.encoder == "none":
            flops += adapter.vision_flops(inputs)
        else:
            flops += adapter.reduced_flops(inputs, pruning.encoder, left)
        flops += 0 if text_tower is None else text_tower.flops(prepared.prompt, left)
    return flops


def beside_decoder(
    adapter: Adapter, pruning: Pruning, prepared: Prepared, text_tower: TextTower | None = None
) -> tuple[int, int]:
    """Encoder and choosing of a prompt, pruned, and the encoder of the same unpruned."""
    text = len(prepared.input_ids) - sum(prepared.image_tokens)
    choosing = choosing_flops(adapter.shape(), pruning, prepared.image_tokens, text)
    plain = sum(adapter.vision_flops(inputs) for inputs in prepared.image_inputs)
    own = plain
    if pruning.encoder != "none" or text_tower is not None:
        own = encoder_flops(adapter, pruning, prepared, text_tower)
    return own + choosing, plain


def report(
    sequence: SequenceState,
    *,
    shape: DecoderShape,
    bytes_per_element: int,
    decode: Callable[[Sequence[int]], str],
    beside: tuple[int, int] = (0, 0),
    explanation: Explanation | None = None,
) -> Result:
    """The result of a sequence whose answer is complete, or which has failed on the device.

    `decode`: token ids to text. `beside`: FLOPs of reading the prompt that are not the decoder's,
    pruned and unpruned. `explanation`: where the request asks for it.
    """
    reason = sequence.finish_reason
    assert reason is not None
    if sequence.failure is not None:
        return _failed(sequence, sequence.failure)
    visual = sequence.visual_tokens
    text = sequence.prompt_tokens - visual
    # An answer's last token need not be stored: it is never fed back. Candidates are not stored.
    added = max(0, len(sequence.token_ids) - 1)
    unpruned = [sequence.prompt_tokens] * shape.num_layers
    present = [tokens - text for tokens in sequence.layer_tokens]
    flops, flops_unpruned = (
        shape.prefill_flops(sequence.layer_tokens),
        shape.prefill_flops(unpruned),
    )
    return Result(
        id=sequence.prepared.id,
        response=None
        if reason == "scored"
        else decode(sequence.token_ids[:-1] if reason == "stop" else sequence.token_ids),
        token_ids=sequence.token_ids,
        logprobs=sequence.logprobs,
        first_logprobs=sequence.first_logprobs,
        candidate_logprobs=sequence.candidate_logprobs,
        candidate_is_top=sequence.candidate_is_top,
        finish_reason=reason,
        prompt_tokens=sequence.prompt_tokens,
        output_tokens=len(sequence.token_ids),
        num_images=len(sequence.spans),
        visual_tokens=visual,
        visual_tokens_encoder=len(sequence.entered) or visual,
        visual_tokens_stages=[len(stage) for stage in sequence.kept],
        retention=layer_average(visual, present) if visual else None,
        prefill_flops=flops,
        prefill_flops_unpruned=flops_unpruned,
        reading_flops=flops + beside[0],
        reading_flops_unpruned=flops_unpruned + beside[1],
        kv_bytes=shape.kv_bytes([n + added for n in sequence.layer_tokens], bytes_per_element),
        kv_bytes_unpruned=shape.kv_bytes([n + added for n in unpruned], bytes_per_element),
        prefill_s=sequence.prefill_s,
        decode_s=sequence.decode_s,
        latency_s=time.perf_counter() - sequence.submitted,
        kept_tokens=[sequence.entered, *sequence.kept] if sequence.entered else sequence.kept,
        explanation=explanation,
    )


def _failed(sequence: SequenceState, failure: str) -> Result:
    """With what is known of the prompt, and nothing of what came of it."""
    return replace(
        failed(sequence.prepared.id, sequence.failure_kind, failure),
        prompt_tokens=sequence.prompt_tokens,
        num_images=len(sequence.spans),
        visual_tokens=sequence.visual_tokens,
        prefill_s=sequence.prefill_s,
        decode_s=sequence.decode_s,
        latency_s=time.perf_counter() - sequence.submitted,
    )
