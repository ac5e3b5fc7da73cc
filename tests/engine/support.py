"""Requests on tiny models, and `generate` of transformers as the oracle."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.tiny.llava import WORDS, tiny_llava
from trio.engine.request import Request, Result, Sampling


def lively_llava(**options: Any) -> Any:
    """A tiny LLaVA whose answers are varied: equal answers then mean something."""
    return tiny_llava(**{"spread": 0.4, **options})


Size = tuple[int, int]
"""Width and height."""
MANY_SIZES: tuple[Size, ...] = (
    (64, 64),
    (30, 45),
    (200, 3),
    (33, 97),
    (128, 96),
    (7, 5),
    (2, 150),
    (96, 33),
    (1, 1),
)


def picture(seed: int, size: Size = (36, 40)) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def mixed_requests(
    count: int, *, seed: int = 0, sizes: Sequence[Size] = ((36, 40),), **sampling: Any
) -> list[Request]:
    """Prompts of many lengths, with no, one or several images, and answers of many lengths."""
    chance = random.Random(seed)
    size = itertools.cycle(sizes)
    return [
        Request(
            prompt=" ".join(chance.choices(WORDS, k=chance.randint(1, 30))),
            images=tuple(
                picture(100 * number + i, next(size)) for i in range(chance.choice((0, 1, 1, 1, 2)))
            ),
            id=number,
            sampling=Sampling(**{"max_new_tokens": chance.randint(1, 14), **sampling}),
        )
        for number in range(count)
    ]


def model_inputs(processor: Any, request: Request) -> dict[str, Any]:
    """A request as transformers itself would prepare it."""
    content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in request.images]
    content.append({"type": "text", "text": request.prompt})
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def batch_inputs(processor: Any, requests: Sequence[Request]) -> dict[str, Any]:
    """Many requests as one padded batch, as transformers itself would prepare it."""
    texts = []
    for request in requests:
        content: list[dict[str, Any]] = [{"type": "image"} for _ in request.images]
        content.append({"type": "text", "text": request.prompt})
        message = [{"role": "user", "content": content}]
        texts.append(processor.apply_chat_template(message, add_generation_prompt=True))
    images = [list(request.images) for request in requests if request.images]
    return processor(images=images or None, text=texts, padding=True, return_tensors="pt")


def generate(model: Any, processor: Any, request: Request, **options: Any) -> Any:
    """What `model.generate` answers to one request, greedily: the whole output object."""
    assert request.sampling is not None
    return model.generate(
        **model_inputs(processor, request),
        max_new_tokens=request.sampling.max_new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        **options,
    )


def new_tokens(output: Any, processor: Any, request: Request) -> list[int]:
    prompt = model_inputs(processor, request)["input_ids"].shape[1]
    return output.sequences[0, prompt:].tolist()


def expected_tokens(model: Any, processor: Any, requests: list[Request]) -> dict[Any, list[int]]:
    return {r.id: new_tokens(generate(model, processor, r), processor, r) for r in requests}


def by_id(results: Any) -> dict[Any, Result]:
    """Results by request; each must have come exactly once."""
    table: dict[Any, Result] = {}
    for result in results:
        assert result.id not in table, f"{result.id!r} came twice"
        table[result.id] = result
    return table


def tokens(results: Any) -> dict[Any, list[int]]:
    return {key: result.token_ids for key, result in by_id(results).items()}


def assert_lively(answers: dict[Any, list[int]]) -> None:
    """Guards the equality tests: answers that are all alike would agree whatever the engine did."""
    long = [answer for answer in answers.values() if len(answer) >= 8]
    assert len({tuple(answer) for answer in answers.values()}) > len(answers) / 2
    assert sum(len(set(answer)) for answer in long) > 0.5 * sum(map(len, long))


def same_weights(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> bool:
    return before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
