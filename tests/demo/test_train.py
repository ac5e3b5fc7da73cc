"""The training program: packed questions equal separate prompts, growing keeps the answers, and an
interrupted run ends in the same weights as one that went through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from trio.demo.training.batches import Batch, make_batch
from trio.demo.training.build import new_model, processor
from trio.demo.training.train_model import Stage, Trainer, answer, grow, see


@pytest.fixture(scope="module")
def batch() -> Batch:
    return make_batch(np.random.default_rng(0), processor().tokenizer, "train", 2, 3)


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    built = new_model(processor().tokenizer, 2)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.mul_(3)
    return built.eval()


@torch.no_grad()
def packed_logits(model: LlavaForConditionalGeneration, batch: Batch) -> torch.Tensor:
    text = model.model.language_model.config
    before, text._attn_implementation = text._attn_implementation, "scene_questions"
    logits = answer(model, see(model, batch)[0], batch, 1)
    text._attn_implementation = before
    return logits


@torch.no_grad()
def test_packed_questions_equal_separate_prompts(
    model: LlavaForConditionalGeneration, batch: Batch
) -> None:
    packed = packed_logits(model, batch)
    image = model.config.image_token_index
    for scene in range(2):
        for segment in (0, 3, int(batch.segments[scene].max())):
            inside = batch.segments[scene] == segment
            tokens = torch.cat(
                [torch.tensor([1, 5, 8]), torch.full((576,), image), batch.tokens[scene][inside]]
            )
            alone = model(input_ids=tokens[None], pixel_values=batch.pixels[scene : scene + 1])
            torch.testing.assert_close(
                packed[scene][inside], alone.logits[0, 579:], rtol=1e-4, atol=1e-4
            )


def test_the_opening_is_what_the_processor_writes() -> None:
    both = processor()
    parts = [{"type": "image"}, {"type": "text", "text": "is there a 3 ?"}]
    conversation: Any = [{"role": "user", "content": parts}]
    prompt = both.apply_chat_template(conversation, add_generation_prompt=True)
    image = both.tokenizer.convert_tokens_to_ids("<image>")
    question = both.tokenizer("is there a 3 ? assistant :", add_special_tokens=False).input_ids
    assert both.tokenizer(prompt).input_ids == [1, 5, 8, image, *question]


def test_targets_spell_the_answers(batch: Batch) -> None:
    tokenizer = processor().tokenizer
    kept = batch.targets[0] != -100
    caption = batch.targets[0][kept & (batch.segments[0] == 0)]
    assert caption[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(caption[:-1]).startswith("a ")
    assert (batch.weights[0][kept] > 0).all()


def test_growing_keeps_the_answers(model: LlavaForConditionalGeneration, batch: Batch) -> None:
    before = packed_logits(model, batch)
    larger = grow(model, 4).eval()
    assert len(larger.model.language_model.layers) == 4
    torch.testing.assert_close(packed_logits(larger, batch), before, rtol=1e-5, atol=1e-5)


STAGES = (
    Stage(name="see", steps=1, batch=1, grid=2, learning_rate=1e-3),
    Stage(name="answer", steps=2, batch=1, grid=2, learning_rate=1e-3, layers=6, pool=2, vision=0),
)


@pytest.mark.slow
def test_a_resumed_run_ends_where_an_unbroken_one_does(tmp_path: Path) -> None:
    def trainer(name: str) -> Trainer:
        return Trainer(tmp_path / name, 0, STAGES, save_every=1, scenes_evaluated=1)

    unbroken = trainer("unbroken")
    unbroken.run()

    class Killed(Exception):
        pass

    broken = trainer("broken")
    steps = iter(range(2))
    step = broken._train_step

    def dying(stage: Stage) -> float:
        if next(steps, None) is None:
            raise Killed
        return step(stage)

    broken._train_step = dying  # type: ignore[method-assign]
    with pytest.raises(Killed):
        broken.run()
    resumed = trainer("broken")
    assert (resumed.stage, resumed.step) == (1, 1)
    resumed.run()
    for name, value in unbroken.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, msg=name)
    saved = LlavaForConditionalGeneration.from_pretrained(tmp_path / "broken" / "model")
    assert saved.dtype == torch.bfloat16
