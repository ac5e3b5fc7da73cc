"""What goes into the engine and what comes out of it. Loads no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import TYPE_CHECKING, Annotated, Any, Literal

from trio.errors import UserError
from trio.values import Fraction, Share, Tokens, Value, number, whole

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from trio.families.pixel_tables import PixelTables

FailureKind = Literal[
    "prompt", "image", "mismatch", "too_long", "no_room", "numeric", "constraint", "incomplete"
]
"""Why a request could not be served:

`prompt`   the prompt or a candidate is no text, or the chat template cannot place it
`image`    an image cannot be read or has an impossible shape
`mismatch` the image placeholders of a prompt do not fit its images
`too_long` prompt and output, or a candidate, together pass the model's context
`no_room`  even alone, the request passes the KV cache or the device's memory
`numeric`  the model's numbers for it are not finite: NaN, or past what its dtype holds
`constraint` its constraint cannot be followed, or leaves no token to choose from
`incomplete` the answer was cut before it was what its constraint asks for
"""


class Unservable(Exception):
    """A request cannot be served; its kind and text go into the failed result."""

    def __init__(self, kind: FailureKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def _real(value: object, fits: Callable[[float], bool]) -> bool:
    return isinstance(value, Real) and math.isfinite(value) and fits(float(value))


def _count(value: object) -> bool:
    return isinstance(value, Integral) and int(value) >= 0


_LIMITS: dict[str, tuple[Callable[[object], bool], str]] = {
    "top_p": (lambda x: _real(x, lambda v: 0 < v <= 1), "lie in (0, 1], 1 for all tokens"),
    "top_k": (_count, "be at least 1, 0 for all tokens"),
    "min_p": (lambda x: _real(x, lambda v: 0 <= v <= 1), "lie in [0, 1], 0 for all tokens"),
    "repetition_penalty": (lambda x: _real(x, lambda v: v > 0), "be above 0, 1 for none"),
    "no_repeat_ngram_size": (_count, "be at least 1, 0 for none"),
    "stop_repetition": (lambda x: isinstance(x, Integral) and int(x) > 1, "be at least 2"),
}
"""What a setting may be, and that in words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Constraint:
    """What an answer must be, as decoded text: one of these, and nothing before or behind it."""

    choices: tuple[str, ...] = ()
    """One of these texts, of any number of words."""
    regex: str | None = None
    """All of it matches this regular expression, whose classes are of ASCII; needs xgrammar (`pip
    install -e '.[structured]'`), and a tokenizer whose tokens spell text."""
    json_schema: str | None = None
    """JSON without white space between its parts that is valid by this schema, which is JSON as
    well; needs the same."""

    def __post_init__(self) -> None:
        given: object = self.choices
        if isinstance(given, str):
            raise UserError("choices is a text; give several texts")
        asked = bool(self.choices), self.regex is not None, self.json_schema is not None
        if sum(asked) != 1:
            raise UserError("a constraint is choices, regex or json_schema: give one of them")

    @property
    def name(self) -> str:
        """In a few words, for messages."""
        if self.choices:
            return f"choices {', '.join(self.choices):.80}"
        return "JSON schema" if self.regex is None else f"regex {self.regex!r:.80}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the tokens of one answer are chosen.

    None leaves a setting to the checkpoint's `generation_config.json`, and where that is silent
    it is off.
    """

    max_new_tokens: Tokens = 64
    """Tokens after which an answer is cut (finish reason `length`)."""
    temperature: Annotated[float, Value(read=number(least=0), unit="NUMBER")] = 0.0
    """0 takes the likeliest token; above 0 logits are divided by it and a token is drawn."""
    top_p: Fraction | None = None
    """Draw from the smallest set of tokens whose probabilities reach this sum, 1 from all (default:
    the checkpoint's, else 1)."""
    top_k: Annotated[int | None, Value(read=whole(0), unit="TOKENS")] = None
    """Draw from this many likeliest tokens, 0 from all (default: the checkpoint's, else 0)."""
    min_p: Share | None = None
    """Draw from tokens with at least this share of the likeliest one's probability, 0 from all
    (default: the checkpoint's, else 0)."""
    repetition_penalty: Annotated[float | None, Value(read=number(above=0), unit="FACTOR")] = None
    """Logits of tokens that stand in prompt or answer are divided by it where they are positive,
    and multiplied where they are negative; 1 is off (default: the checkpoint's, else 1)."""
    no_repeat_ngram_size: Annotated[int | None, Value(read=whole(0), unit="TOKENS")] = None
    """No run of so many tokens comes twice in prompt and answer; 0 is off (default: the
    checkpoint's, else 0)."""
    seed: int | None = None
    """Seed of this request's own random stream; None: a fresh one each time."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the answer, besides the model's own end-of-sequence tokens."""
    ignore_eos: bool = False
    """Go on after the model's own end-of-sequence tokens (for measuring speed)."""
    stop_repetition: Annotated[int | None, Value(read=whole(2), unit="TIMES")] = None
    """End an answer (finish reason `repetition`) in which the same 1 to 64 tokens stand so many
    times in a row, 16 tokens or more in all; 4 is a good choice (default: never)."""
    first_logprobs: bool = False
    """Give the first token's whole distribution in the result (for comparing settings)."""
    constraint: Constraint | None = None
    """What the answer must be; one that is cut before it is that is an error (`incomplete`).
    The model's end of sequence comes only where it is."""

    def __post_init__(self) -> None:
        limit: object = self.max_new_tokens
        if not isinstance(limit, Integral) or limit < 1:
            raise UserError(f"max_new_tokens is {limit!r}; it must be an integer of at least 1")
        if not _real(self.temperature, lambda x: x >= 0):
            raise UserError(f"temperature is {self.temperature!r}; it must be 0 or more")
        if self.constraint is not None and self.ignore_eos:
            raise UserError("ignore_eos: an answer with a constraint ends where that is met")
        for name, (fits, must) in _LIMITS.items():
            value = getattr(self, name)
            if value is not None and not fits(value):
                raise UserError(
                    f"{name} is {value!r}; it must {must}, or None for the checkpoint's"
                )


class ImageInputs(dict[str, Any]):
    """What an image processor made of one image; `digest` is the same for equal ones.

    With `tables` its pixels are still uint8: `trio.families.pixel_tables.finished` makes the
    model's floats of them.
    """

    __slots__ = ("digest", "tables")

    def __init__(
        self, values: Mapping[str, Any], digest: bytes, tables: PixelTables | None = None
    ) -> None:
        super().__init__(values)
        self.digest = digest
        self.tables = tables


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ProcessedImage:
    """An image after the model's image processor, but for rescaling and normalising.

    Made by `Preprocessor.process`, in a process that may have no model.
    """

    input_ids: np.ndarray
    """`[N]` int64, the placeholder tokens that stand for it in a prompt."""
    inputs: Mapping[str, np.ndarray]
    """What the processor made of it: pixels as uint8 in the shape that the model takes, all else
    (sizes, grids) as it is. May be read-only."""
    digest: bytes
    """Of these, the same for equal ones."""
    prompt_images: int = 1
    """Images of its prompt: some processors cut an image into tiles only where it is alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One question about any number of images.

    `prompt` is the user's text alone: the engine applies the model's chat template and places the
    images before the text. Special tokens spelt out in it stay text. `id` comes back in the result.
    """

    prompt: str
    images: tuple[Any, ...] = ()
    """PIL images, or `ProcessedImage`s of a `Preprocessor` of the same model; not both."""
    id: Any = None
    system: str | None = None
    """The system message, where the chat template has a place for one; None: the engine's."""
    sampling: Sampling | None = None
    """None: the engine's default."""
    candidates: tuple[str, ...] = ()
    """Answers whose log-probabilities are wanted; the model then gives none of its own. Each stands
    directly behind the prompt: some models want a space before it. Special tokens spelt out in them
    stay text."""
    with_eos: bool = False
    """Whether the tokenizer's end of sequence counts as the last token of each candidate."""
    explain: bool = False
    """Whether the result is to say what each visual token shows and how it was scored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A request after the CPU work: what the model takes, before any device is touched."""

    input_ids: tuple[int, ...]
    """The whole prompt, each image as its run of placeholder tokens."""
    image_tokens: tuple[int, ...] = ()
    """Placeholder tokens of each image, in the prompt's order."""
    image_inputs: tuple[Mapping[str, Tensor], ...] = ()
    """What the image processor made of each image, one mapping per image. Pixels may still be
    uint8, see `ImageInputs`."""
    prompt: str = ""
    """The user's text alone, for a method that compares images with it."""
    instruction_ids: tuple[int, ...] = ()
    """The same as the decoder's tokens, without those that only a chat template may write."""
    id: Any = None
    sampling: Sampling | None = None
    candidates: tuple[tuple[int, ...], ...] = ()
    """Tokens of each answer to be scored."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Explanation:
    """What the visual tokens of a prompt show, and the scores by which they were chosen."""

    image_tokens: tuple[int, ...]
    """Visual tokens of each image, before any reduction; `V` is their sum."""
    boxes: np.ndarray
    """`[V, 4]` float32: left, top, right and bottom of what each visual token shows, in fractions
    of its own image's width and height, the image being upright; NaN where it shows no place."""
    saliency: tuple[np.ndarray, ...]
    """Of each pruning stage `[V]` float32: the scores by which tokens were chosen there, NaN of
    tokens that were gone; empty where the method has none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What became of one request. What was not reached or does not apply is None."""

    id: Any
    response: str | None = None
    """The decoded answer without special tokens and surrounding white space, but for what a regex
    asks for; with error `incomplete` as far as it came."""
    token_ids: list[int] = field(default_factory=list)
    """The answer's tokens, the one that stopped it included."""
    logprobs: list[float] = field(default_factory=list)
    """Natural log of each token's probability under the model, before all rules of decoding,
    temperature and cuts."""
    first_logprobs: Tensor | None = field(default=None, compare=False, repr=False)
    """Where the sampling asks for it: the same of every token that could have come first, [V]
    float32 on the CPU."""
    candidate_logprobs: list[list[float]] = field(default_factory=list)
    """Of each candidate, natural log of each token's probability under the model, given the prompt
    and the candidate's tokens before it."""
    candidate_is_top: list[list[bool]] = field(default_factory=list)
    """Of the same tokens, whether the model itself finds none likelier there."""
    finish_reason: Literal["stop", "length", "repetition", "scored", "error"]
    error: str | None = None
    """`kind: message`; the kinds are those of `FailureKind`."""
    prompt_tokens: int | None = None
    """Tokens of the prompt, with all visual tokens from the encoder."""
    output_tokens: int | None = None
    num_images: int | None = None
    visual_tokens: int | None = None
    """Visual tokens from the encoder, before any reduction."""
    visual_tokens_encoder: int | None = None
    """Visual tokens that enter the decoder."""
    visual_tokens_stages: list[int] | None = None
    """Visual tokens left after each pruning stage."""
    retention: float | None = None
    """Layer average of visual tokens present over visual tokens the encoder gave."""
    prefill_flops: float | None = None
    """FLOPs of the decoder's prefill, by the field's convention (see `trio.pruning.flops`)."""
    prefill_flops_unpruned: float | None = None
    reading_flops: float | None = None
    """`prefill_flops`, those of the vision encoder and those of scoring and choosing tokens."""
    reading_flops_unpruned: float | None = None
    kv_bytes: int | None = None
    """Keys and values stored for this request when it finished, over all layers."""
    kv_bytes_unpruned: int | None = None
    prefill_s: float | None = None
    """This request's share, by tokens of prompts, of the time spent on encoding images, on prefill
    and on candidates."""
    decode_s: float | None = None
    """This request's share of the decode steps it took part in, in seconds."""
    latency_s: float | None = None
    """Seconds from being handed to the engine to the last token, or the candidates' scores."""
    kept_tokens: list[list[int | None]] | None = None
    """Per stage, the kept visual tokens as indices into the prompt's visual tokens before any
    reduction; first those that the encoder left, if it reduced them. A merged token counts as the
    one that it was merged into, and None is the class token of the encoder."""
    explanation: Explanation | None = None
    """Where the request asks for it."""

    @property
    def logprob_mean(self) -> float | None:
        return sum(self.logprobs) / len(self.logprobs) if self.logprobs else None


def failed(request_id: Any, kind: FailureKind, message: str) -> Result:
    """The result of a request that cannot be served."""
    return Result(id=request_id, finish_reason="error", error=f"{kind}: {message}")
