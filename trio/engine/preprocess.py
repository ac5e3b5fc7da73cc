"""CPU work before the engine: chat template, tokens, image tensors. Needs no model.

Safe to call from many threads at once, and picklable, so that workers without a device can
prepare requests for one that has it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache, cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL.Image import Image
from tokenizers import Tokenizer

from trio.engine.request import (
    ImageInputs,
    Prepared,
    ProcessedImage,
    Request,
    Result,
    Unservable,
    failed,
)
from trio.errors import UserError, first_line, kind_and_line
from trio.families.pixel_tables import UNFINISHED, CannotCut, PixelTables, learn

if TYPE_CHECKING:
    from torch import Tensor

    from trio.families.adapter import Adapter, Inputs
    from trio.families.coordinates import Frame

_log = logging.getLogger(__name__)
_MARK = "\ue000user text\ue000"
_SHORT = "a"
"""A prompt of anybody's."""
_SYSTEM_MARK = "\ue000system text\ue000"
Part = tuple[int, int]
"""Of a text, from a character to before another."""
_TEXT_KEYS = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}
MAX_ASPECT_RATIO = 200
"""Resizing by the shorter edge makes the longer one this many times as long."""
_MOST_PIXELS = 64_000_000
"""Of images that were read and wait to be prepared, three bytes each."""


class Preprocessor:
    """Turns requests into what the model takes.

    `processor`: a transformers processor with a chat template and a fast tokenizer.
    `family`: adapter of the model's family, which knows how to use it.
    `system`: message for requests without their own; None leaves it to the chat template.
    """

    def __init__(self, processor: Any, family: type[Adapter], system: str | None = None) -> None:
        backend = getattr(processor.tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UserError("the model's tokenizer has no tokenizer.json; save it as a fast one")
        if not processor.chat_template:
            raise UserError("the model's processor has no chat template (chat_template.jinja)")
        self._processor = processor
        self._family = family
        self._system = system
        self._said_apart = False
        # Our own copy: calls of the shared one change its truncation and padding under way.
        self._tokenizer = Tokenizer.from_str(backend.to_str())
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.image_token: str = processor.image_token
        self.image_token_id: int = processor.image_token_id

    def __getstate__(self) -> dict[str, Any]:
        own = {"processor": self._processor, "family": self._family, "system": self._system}
        return own | {"tables": self.__dict__.get("_tables")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        tables = state.pop("tables")
        self.__init__(**state)  # type: ignore[misc]
        if tables is not None:
            self.__dict__["_tables"] = tables

    def __call__(self, request: Request, *, uint8: bool = False) -> Prepared | Result:
        """The prepared request, or a failed result where the request itself is at fault.

        uint8: leave pixels uint8, which takes half the time, where the processor can be stopped
            there.
        """
        try:
            images = self._images(request.images, uint8)
            expansions = [ids for ids, _ in images]
            text, theirs = self._rendered(request, len(images))
            input_ids = self._tokens(text, theirs, expansions)
            candidates = tuple(self._candidates(request, text, theirs, expansions, input_ids))
        except Unservable as fault:
            return failed(request.id, fault.kind, str(fault))
        return Prepared(
            input_ids=tuple(input_ids),
            image_tokens=tuple(ids.count(self.image_token_id) for ids, _ in images),
            image_inputs=tuple(inputs for _, inputs in images),
            prompt=request.prompt,
            instruction_ids=tuple(self._instruction(request.prompt)),
            id=request.id,
            sampling=request.sampling,
            candidates=candidates,
            explain=request.explain,
            frames=self._frames(request),
        )

    @property
    def cut(self) -> bool:
        """Whether the processor can be stopped at uint8 pixels, so that `process` can be called.

        Found out once, by running it on probe images; goes along when this is pickled.
        """
        return not self.why_not_cut

    @property
    def why_not_cut(self) -> str:
        """Empty where `cut` is true."""
        return self._tables if isinstance(self._tables, str) else ""

    def process(self, images: Sequence[Image]) -> list[ProcessedImage]:
        """The model's image processor on the images of one prompt, up to uint8 pixels.

        A request with what comes out of it is read bit for bit as one with the images.

        Raises:
            Unservable: an image that cannot be read or has an impossible shape.
            UserError: this processor cannot be stopped there.
        """
        tables = self._known_tables()
        made = self._family.process_images(self._processor, _checked(images), **UNFINISHED)
        inputs = [tables.to_uint8(_tensors(image)) for image in made]
        return [
            ProcessedImage(
                input_ids=image["input_ids"][0].numpy(),
                inputs=own,
                digest=_digest(own),
                prompt_images=len(images),
                size=given.size,
            )
            for given, image, own in zip(images, made, inputs, strict=True)
        ]

    @cached_property
    def _tables(self) -> PixelTables | str:
        """What finishes uint8 pixels, or why nothing can."""
        try:
            return learn(partial(self._family.process_images, self._processor))
        except CannotCut as reason:
            return str(reason)

    def _known_tables(self) -> PixelTables:
        if isinstance(self._tables, str):
            raise UserError(f"the image processor cannot be stopped at uint8: {self._tables}")
        return self._tables

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of an answer, without special tokens and surrounding white space."""
        return self.text_of(token_ids).strip()

    def text_of(self, token_ids: Sequence[int]) -> str:
        """The same with white space around it."""
        text: str = self._processor.tokenizer.decode(token_ids, skip_special_tokens=True)
        return text

    def spellings(self, answer: str) -> list[tuple[int, ...]]:
        """Tokens that decode to an answer: as it stands behind a prompt, with a space before it or
        none, and by itself.

        Raises:
            UserError: no tokens of the model do, as of an unknown word.
        """
        one_token = [[self.image_token_id]]
        try:
            _check_text(answer, "choice")
            text, theirs = self._rendered(Request(prompt=_SHORT), 1)
            prompt = self._tokens(text, theirs, one_token)
            forms = (answer, f" {answer}")
            found = [self._behind(form, text, theirs, one_token, prompt) for form in forms]
        except Unservable as fault:
            raise UserError(str(fault)) from fault
        found.append(self._tokens(answer, [(0, len(answer))], (), special=False))
        spelt = [
            tuple(ids)
            for ids in found
            if ids and self._control_ids.isdisjoint(ids) and self.decode(ids) == answer
        ]
        if not spelt:
            raise UserError(f"choice {answer!r:.60}: the model has no tokens that decode to it")
        return spelt

    def _instruction(self, prompt: str) -> Iterator[int]:
        ids = self._tokenizer.encode(prompt, add_special_tokens=False).ids
        return (token for token in ids if token not in self._control_ids)

    def _images(self, images: Sequence[Any], uint8: bool) -> list[tuple[list[int], ImageInputs]]:
        """For each image the placeholder tokens that stand for it, and its tensors."""
        if uint8 and self.cut and not _some_processed(images):
            images = self.process(images)
        if _some_processed(images):
            return [self._finished(image, f"image {n}", images) for n, image in enumerate(images)]
        made = self._family.process_images(self._processor, _checked(images))
        tensors = [_tensors(image) for image in made]
        return [
            (image["input_ids"][0].tolist(), ImageInputs(own, _digest(own)))
            for image, own in zip(made, tensors, strict=True)
        ]

    def _frames(self, request: Request) -> tuple[Frame | None, ...]:
        """`Prepared.frames`."""
        if not request.explain:
            return ()
        return tuple(self._frame(image.size) for image in request.images)

    def _frame(self, size: tuple[int, int] | None) -> Frame | None:
        if size is None:
            return None
        try:
            return self._family.frame(self._processor, size)
        except Exception as error:  # a processor may be anybody's, and answers do not depend on it
            _say_without_frame(type(self._processor).__name__, kind_and_line(error))
            return None

    def _finished(
        self, image: Any, where: str, images: Sequence[Any]
    ) -> tuple[list[int], ImageInputs]:
        if not isinstance(image, ProcessedImage):
            raise Unservable("image", f"{where} is not processed, and others of its prompt are")
        if image.prompt_images != len(images):
            numbers = f"{image.prompt_images} of a prompt, and here are {len(images)}"
            raise Unservable("mismatch", f"{where} was processed as one of {numbers}")
        try:
            tables = self._known_tables()
            made = tables.tensors(image.inputs)
        except ValueError as fault:
            message = f"{where} was not processed for this model: {first_line(fault)}"
            raise Unservable("image", message) from fault
        return image.input_ids.tolist(), ImageInputs(made, image.digest, tables)

    def _candidates(
        self,
        request: Request,
        text: str,
        theirs: Sequence[Part],
        expansions: Sequence[list[int]],
        prompt: list[int],
    ) -> Iterator[tuple[int, ...]]:
        """Tokens of each answer to be scored, behind the prompt that was rendered as `text`."""
        given: object = request.candidates
        if isinstance(given, str):
            raise Unservable("prompt", "candidates is a text; give several texts")
        for answer in request.candidates:
            _check_text(answer, "candidate")
            ids = self._behind(answer, text, theirs, expansions, prompt)
            if ids is None:
                self._say_apart(answer)
                ids = self._tokens(answer, [(0, len(answer))], (), special=False)
            if not ids:
                raise Unservable("prompt", f"candidate {answer!r:.60} has no tokens")
            yield (*ids, self._end_id) if request.with_eos else tuple(ids)

    def _behind(
        self,
        answer: str,
        text: str,
        theirs: Sequence[Part],
        expansions: Sequence[list[int]],
        prompt: list[int],
    ) -> list[int] | None:
        """Tokens of an answer behind a prompt, which was rendered as `text`; None where it changes
        those of the prompt."""
        own = len(text), len(text) + len(answer)
        both = self._tokens(text + answer, [*theirs, own], expansions)
        return both[len(prompt) :] if both[: len(prompt)] == prompt else None

    def _say_apart(self, answer: str) -> None:
        if not self._said_apart:
            self._said_apart = True
            _log.warning(
                "candidate %.60r changes the prompt's last tokens: it is scored as tokenised by "
                "itself, which may put a space before it; so are all such candidates",
                answer,
            )

    @property
    def _end_id(self) -> int:
        end: int | None = self._processor.tokenizer.eos_token_id
        if end is None:
            raise Unservable("prompt", "the tokenizer has no end of sequence to count")
        return end

    def _rendered(self, request: Request, images: int) -> tuple[str, list[Part]]:
        """The whole prompt as text, and where the words of others than the template lie in it."""
        _check_text(request.prompt, "prompt")
        system = self._system if request.system is None else request.system
        if system is not None:
            _check_text(system, "system message")
        text = self._render(request.prompt, images, system)
        return text, self._their_parts(text, images, system)

    def _tokens(
        self,
        text: str,
        theirs: Sequence[Part],
        expansions: Sequence[list[int]],
        *,
        special: bool = True,
    ) -> list[int]:
        """Token ids of a text, with each image's placeholders in its place.

        Args:
            theirs: where control tokens are text.
            special: whether the tokenizer adds what begins a sequence, unless the text has it.
        """
        bos, unknown = self._processor.tokenizer.bos_token, self._unknown
        add_special = special and not (bos and text.startswith(bos))
        encoded = self._tokenizer.encode(text, add_special_tokens=add_special)
        places = 0
        ids: list[int] = []
        for token, (begin, end) in zip(encoded.ids, encoded.offsets, strict=True):
            if (token in self._control_ids or text[begin:end].strip() == unknown) and any(
                _lies_in(part, text, begin, end) for part in theirs
            ):
                ids += self._literal(text[begin:end])
            elif token == self.image_token_id:
                ids += expansions[places] if places < len(expansions) else [token]
                places += 1
            else:
                ids.append(token)
        if places != len(expansions):
            raise Unservable(
                "mismatch", f"{len(expansions)} images, but the chat template placed {places}"
            )
        return ids

    def _render(self, prompt: str, images: int, system: str | None) -> str:
        content = [{"type": "image"}] * images + [{"type": "text", "text": prompt}]
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if system is not None:
            spoken = [{"type": "text", "text": system}]
            messages = [{"role": "system", "content": spoken}, *messages]
        try:
            return self._processor.apply_chat_template(messages, add_generation_prompt=True)
        except Exception as fault:  # whatever the template's author chose to raise
            message = f"the chat template refuses it: {kind_and_line(fault)}"
            raise Unservable("prompt", message) from fault

    def _their_parts(self, text: str, images: int, system: str | None) -> list[Part]:
        """Where the words of others than the template lie in the rendered prompt."""
        frame = self._render(_MARK, images, None if system is None else _SYSTEM_MARK)
        before, found, rest = frame.rpartition(_SYSTEM_MARK)
        if system is not None and not (found and text.startswith(before)):
            raise Unservable(
                "prompt", "the chat template has no place for a system message before the prompt"
            )
        between, *after = rest.split(_MARK)
        if len(after) != 1 or not text.endswith(after[0]):
            raise Unservable("prompt", "the chat template does not place the prompt exactly once")
        start, stop = len(before), len(text) - len(after[0])
        # Templates may strip what they are given.
        for said in ("",) if system is None else (system.strip(), system):
            if text.startswith(said + between, start):
                end = start + len(said)
                return [(start, end), (end + len(between), stop)]
        raise Unservable("prompt", "the chat template changes the prompt or what is before it")

    @property
    def _unknown(self) -> str | None:
        """Stands for every unknown word, so its id does not tell that a user has spelt it out."""
        unknown: str | None = self._processor.tokenizer.unk_token
        return unknown

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        """Tokens that only the template may write; spelt out by a user they are plain text."""
        added = self._tokenizer.get_added_tokens_decoder()
        special = {token for token, entry in added.items() if entry.special}
        return frozenset(special - {self._processor.tokenizer.unk_token_id}) | {self.image_token_id}

    @cached_property
    def _plain_tokenizer(self) -> Tokenizer:
        """The same tokenizer without its control tokens."""
        state = json.loads(self._tokenizer.to_str())
        state["added_tokens"] = [
            entry
            for entry in state["added_tokens"]
            if entry["id"] not in self._control_ids and entry["content"] != self._unknown
        ]
        state["post_processor"] = None
        return Tokenizer.from_str(json.dumps(state))

    def _literal(self, text: str) -> Iterator[int]:
        """Ids that spell a control token out as text."""
        whole = self._plain_tokenizer.encode(text, add_special_tokens=False).ids
        if self._control_ids.isdisjoint(whole):
            return iter(whole)
        # A vocabulary of whole words knows it as a word; letter by letter it cannot.
        letters = (self._plain_tokenizer.encode(c, add_special_tokens=False).ids for c in text)
        return (token for ids in letters for token in ids if token not in self._control_ids)


def ahead(
    prepare: Preprocessor, requests: Iterable[Request | Prepared], *, threads: int
) -> Generator[Prepared | Result, None, None]:
    """Requests in their order, prepared in threads while whoever takes them does other things.

    Twice as many as there are threads are pulled ahead, fewer of large images. They are read as
    they are pulled: what a request was made of may be closed or changed when the next one is asked
    for.
    """
    waiting: deque[_Begun] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="trio-prepare")
    try:
        for request in requests:
            waiting.append(_begun(pool, prepare, request))
            while len(waiting) > 2 * threads or sum(one.pixels for one in waiting) > _MOST_PIXELS:
                yield waiting.popleft().outcome()
        while waiting:
            yield waiting.popleft().outcome()
    finally:
        pool.shutdown(cancel_futures=True)


class _Begun(NamedTuple):
    """A request that is prepared, or will be."""

    outcome: Callable[[], Prepared | Result]
    """Waits for it."""
    pixels: int = 0
    """Of its images as they were given."""


def _begun(pool: ThreadPoolExecutor, prepare: Preprocessor, request: Request | Prepared) -> _Begun:
    if isinstance(request, Prepared):
        return _Begun(lambda: request)
    read, pixels = request, 0
    if not _some_processed(request.images):
        try:
            images = _checked(request.images)
        except Unservable as fault:
            result = failed(request.id, fault.kind, str(fault))
            return _Begun(lambda: result)
        read = replace(request, images=tuple(images))
        pixels = sum(image.width * image.height for image in images)
    return _Begun(pool.submit(prepare, read, uint8=True).result, pixels)


def _some_processed(images: Sequence[Any]) -> bool:
    return any(isinstance(image, ProcessedImage) for image in images)


def _tensors(image: Inputs) -> dict[str, Tensor]:
    return {name: image[name] for name in image if name not in _TEXT_KEYS}


def _digest(inputs: Mapping[str, Any]) -> bytes:
    """The same for the same arrays under the same names."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(inputs):
        array = np.asarray(inputs[name], order="C")
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.digest()


def _checked(images: Sequence[Any]) -> list[Image]:
    return [_rgb(image, f"image {place}") for place, image in enumerate(images)]


def _rgb(image: Any, where: str) -> Image:
    if not isinstance(image, Image):
        raise Unservable("image", f"{where} is {type(image).__name__}, not a PIL image")
    try:
        rgb = image.convert("RGB")
    except Exception as fault:  # what a decoder raises on broken data is not documented
        raise Unservable("image", f"{where}: {type(fault).__name__}: {fault}") from fault
    if min(rgb.size) < 1 or max(rgb.size) > MAX_ASPECT_RATIO * min(rgb.size):
        raise Unservable(
            "image",
            f"{where} is {rgb.width} x {rgb.height}; one edge may be at most "
            f"{MAX_ASPECT_RATIO} times the other",
        )
    return rgb


def _check_text(text: Any, what: str) -> None:
    if not isinstance(text, str):
        raise Unservable("prompt", f"the {what} is {type(text).__name__}, not text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Unservable("prompt", f"the {what} is not valid Unicode text") from None


def _lies_in(part: tuple[int, int], text: str, begin: int, end: int) -> bool:
    """Whether a token's text is in a part; some tokens swallow white space around them."""
    word = text[begin:end]
    begin += len(word) - len(word.lstrip())
    return part[0] <= begin < begin + len(word.strip()) <= part[1]


@cache
def _say_without_frame(processor: str, why: str) -> None:
    _log.warning(
        "explanations do not say where visual tokens lie: what %s makes of an image: %s",
        processor,
        why,
    )
