"""The text tower: it belongs to the demo's vision tower, reads a text to its end, and what it was
trained for holds on held-out scenes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoTokenizer,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaForConditionalGeneration,
)

from trio.demo import CLIP, MODEL
from trio.demo.language import tokenizer
from trio.demo.scenes import caption, make_scene
from trio.demo.training.train_text_tower import (
    LENGTH,
    Seen,
    about,
    caption_of,
    contrast,
    draw_text,
    facts_of,
    fit,
    look,
    new_clip,
    patches,
    presence,
    retrieval,
    text_tokenizer,
    truth,
)

RED_5, BLUE_3 = (5, "red"), (3, "blue")


@pytest.fixture(scope="module")
def words() -> Any:
    return AutoTokenizer.from_pretrained(CLIP)


@pytest.fixture(scope="module")
def clip() -> CLIPModel:
    return CLIPModel.from_pretrained(CLIP).float().eval()


@pytest.fixture(scope="module")
def heldout(clip: CLIPModel) -> Seen:
    return look(clip.vision_model, "heldout", 64, seed=7)


def test_the_vision_tower_is_the_demo_models() -> None:
    demo = LlavaForConditionalGeneration.from_pretrained(MODEL).model.vision_tower.state_dict()
    shipped = CLIPModel.from_pretrained(CLIP).vision_model.state_dict()
    assert shipped.keys() == demo.keys()
    for name, value in demo.items():
        assert shipped[name].dtype == value.dtype == torch.bfloat16
        assert torch.equal(shipped[name], value), name


def test_the_tokenizers_are_what_the_programs_make(words: Any) -> None:
    text = "Where is the red 5 ?"
    for made, shipped in (
        (text_tokenizer(), words),
        (tokenizer(), AutoTokenizer.from_pretrained(MODEL)),
    ):
        assert made.get_vocab() == shipped.get_vocab()
        assert made(text).input_ids == shipped(text).input_ids
        assert made.padding_side == shipped.padding_side
    assert words.tokenize(text, add_special_tokens=True)[-1] == "</s>"


@torch.no_grad()
def test_pooling_is_at_the_end_of_each_text(clip: CLIPModel, words: Any) -> None:
    texts = ["a 5", "is there a red 5 in the bottom-right ?"]
    batch = words(texts, padding=True, return_tensors="pt")
    output = clip.text_model(**batch)
    for row, text in enumerate(texts):
        alone = clip.text_model(**words(text, return_tensors="pt"))
        torch.testing.assert_close(output.pooler_output[row], alone.last_hidden_state[0, -1])


@torch.no_grad()
def test_scenes_and_texts_find_each_other(clip: CLIPModel, words: Any, heldout: Seen) -> None:
    assert min(retrieval(clip, words, heldout).values()) > 0.75
    assert min(presence(clip, words, heldout).values()) > 0.95


def test_patches_of_the_object_asked_about_are_closer_than_those_of_others(
    clip: CLIPModel, words: Any
) -> None:
    measured = patches(clip, words, scenes=4, seed=7)
    for template in ("which digit is {color} ?", "where is the {digit} ?"):
        assert measured[f"layer -1, {template}, other objects"] > 0.7


def test_a_text_is_true_where_all_that_it_names_is_shown() -> None:
    scenes = [[RED_5, BLUE_3], [(5, "blue"), (3, "red")], [RED_5]]
    texts = [
        caption_of([RED_5, BLUE_3]),
        about("is there a {color} {digit} ?", RED_5),
        about("where is the {digit} ?", BLUE_3),
        about("describe the image .", RED_5),
    ]
    expected = [[1, 1, 1, 1], [0, 0, 1, 1], [0, 1, 0, 1]]
    assert truth(scenes, texts).int().tolist() == expected


def test_drawn_texts_are_true_and_in_the_vocabulary(words: Any) -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        scene = make_scene(rng, "train", grid=2)
        objects = [(item.digit, item.color) for item in scene.items]
        text = draw_text(rng, objects)
        assert text.facts <= facts_of(objects)
        tokens = words(text.words).input_ids
        assert len(tokens) <= LENGTH and words.unk_token_id not in tokens
        assert caption_of(objects).words == caption(scene).answer


def test_true_pairs_share_the_aim_of_their_row_and_column() -> None:
    scores = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    rows, columns = -scores.log_softmax(1), -scores.log_softmax(0)
    true = torch.eye(6, dtype=torch.bool)
    torch.testing.assert_close(contrast(scores, true), (rows + columns).diagonal().mean() / 2)
    true[0, 1] = True
    by_rows = (rows[0, 0] + rows[0, 1]) / 2 + rows.diagonal()[1:].sum()
    by_columns = (columns[0, 1] + columns[1, 1]) / 2 + columns.diagonal()[[0, 2, 3, 4, 5]].sum()
    torch.testing.assert_close(contrast(scores, true), (by_rows + by_columns) / 12)


def test_training_lowers_the_loss_and_leaves_the_vision_tower() -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    tower = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        )
    )
    words = text_tokenizer()
    objects = [
        [(item.digit, item.color) for item in make_scene(rng, "train", grid=1).items]
        for _ in range(64)
    ]
    clip = new_clip(tower, words)
    seen = Seen(features=torch.randn(64, 32), objects=objects)
    losses = fit(clip, words, seen, steps=30, batch=32, seed=0)
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.2
    for name, value in tower.state_dict().items():
        assert torch.equal(clip.vision_model.state_dict()[name], value), name
