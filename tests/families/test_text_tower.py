"""The text side of a CLIP checkpoint: the same as CLIP's own, and only beside its vision tower."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tests.tiny.clip import CONTEXT, tiny_clip
from trio.errors import UserError
from trio.families.text_tower import TextTower

WORDS = ["!", "<|startoftext|>", *"abcdefghijklmnopqrstuvwxyz", "<|endoftext|>"]
BEGIN, END = WORDS.index("<|startoftext|>"), WORDS.index("<|endoftext|>")
VISION: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "initializer_range": 0.15,
}


def clip_of(seed: int = 0, **vision: Any) -> Any:
    size = len(WORDS)
    return tiny_clip(VISION | vision, words=size, begin=BEGIN, end=END, joint=20, seed=seed)


def save_tokenizer(directory: Path, words: list[str] = WORDS, **named: str) -> None:
    vocabulary = {word: number for number, word in enumerate(words)}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="!"))
    letters.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"} | named
    kind = PreTrainedTokenizerFast(tokenizer_object=letters, **names)
    kind.save_pretrained(directory)


@pytest.fixture
def clip() -> Any:
    return clip_of()


@pytest.fixture
def saved(clip: Any, tmp_path: Path) -> str:
    clip.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    return str(tmp_path)


def load(saved: str, tower: Any, dtype: torch.dtype = torch.float32, **options: Any) -> TextTower:
    return TextTower.load(saved, tower, device="cpu", dtype=dtype, **options)


def refusal(saved: str, tower: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(saved, tower, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_projections_are_those_of_clip(clip: Any, saved: str) -> None:
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        hidden = clip.vision_model(pixel_values=pixels).last_hidden_state
        expected = clip.get_image_features(pixel_values=pixels).pooler_output
    got = load(saved, clip.vision_model).project(hidden[:, 0])
    assert torch.equal(got, expected)
    assert not got.requires_grad


def test_texts_are_those_of_clip(clip: Any, saved: str) -> None:
    tower = load(saved, clip.vision_model)
    texts = ["a b c", "", "x y z d e f"]
    found = tower.embed(texts)
    assert len(found) == 3
    for text, own in zip(texts, found, strict=True):
        ids = [BEGIN, *(WORDS.index(letter) for letter in text.split()), END]
        with torch.no_grad():
            theirs = clip.get_text_features(input_ids=torch.tensor([ids]))
            tokens = clip.text_projection(theirs.last_hidden_state)
        assert own.tokens_CLP.shape == (1, CONTEXT, 20)
        assert torch.allclose(own.pooled_CP, theirs.pooler_output, atol=1e-5)
        assert torch.allclose(own.tokens_CLP[:, : len(ids)], tokens, atol=1e-5)
        words = [0 < place < len(ids) - 1 for place in range(CONTEXT)]
        assert own.mask_CL.tolist() == [words]
        assert not own.tokens_CLP.requires_grad


def test_a_text_alone_is_the_same(clip: Any, saved: str) -> None:
    tower = load(saved, clip.vision_model)
    (alone,) = tower.embed(["a b c"])
    among = tower.embed(["q r s t u v w x", "a b c"])[1]
    assert torch.allclose(among.tokens_CLP, alone.tokens_CLP, atol=1e-5)
    assert tower.embed([]) == []


def test_long_texts_are_cut(clip: Any, saved: str) -> None:
    tower = load(saved, clip.vision_model)
    letters = [*"abcdefghijklmnop"]  # 16, of which 6 fit between begin and end
    pieces = [" ".join(letters[at : at + 6]) for at in range(0, 16, 6)]
    before, whole, *parts = tower.embed(["z", " ".join(letters), *pieces])
    assert before.pooled_CP.shape == (1, 20)
    assert whole.tokens_CLP.shape == (3, CONTEXT, 20) and whole.pooled_CP.shape == (3, 20)
    assert whole.mask_CL.sum(dim=1).tolist() == [6, 6, 4]
    for number, part in enumerate(parts):
        assert torch.allclose(whole.tokens_CLP[number], part.tokens_CLP[0], atol=1e-5)
        assert torch.allclose(whole.pooled_CP[number], part.pooled_CP[0], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_weights_belong_to_the_same_tower(
    clip: Any, saved: str, dtype: torch.dtype
) -> None:
    rounded = clip_of().vision_model.to(dtype)
    assert load(saved, rounded).embed(["a"])[0].pooled_CP.dtype == torch.float32
    tower = load(saved, clip.vision_model, dtype)
    assert tower.embed(["a"])[0].tokens_CLP.dtype == dtype
    assert tower.project(torch.zeros(3, 24)).dtype == dtype


def test_a_tower_of_other_sizes(saved: str) -> None:
    text = refusal(saved, clip_of(hidden_size=32, image_size=40).vision_model)
    assert "hidden_size 24 instead of 32, image_size 32 instead of 40" in text
    assert "give the CLIP checkpoint that the vision tower was taken from" in text


def test_a_tower_of_other_weights(clip: Any, saved: str) -> None:
    assert "embeddings.patch_embedding.weight" in refusal(saved, clip_of(seed=1).vision_model)
    clip.vision_model.encoder.layers[1].mlp.fc1.weight.data.mul_(1.05)
    text = refusal(saved, clip.vision_model)
    assert "encoder.layers.1.mlp.fc1.weight differs by 0.050" in text and "more than 0.01" in text
    load(saved, clip.vision_model, tolerance=0.1)
    clip.vision_model.embeddings.patch_embedding.weight.data[:] = torch.nan
    assert "differs by nan" in refusal(saved, clip.vision_model)


def test_a_tower_of_another_kind(saved: str) -> None:
    siglip = SiglipVisionModel(SiglipVisionConfig(**VISION))
    assert "'siglip_vision_model'" in refusal(saved, siglip)


def test_without_a_tokenizer(clip: Any, tmp_path: Path) -> None:
    clip.save_pretrained(tmp_path)
    assert "tokenizer" in refusal(str(tmp_path), clip.vision_model)


def test_a_tokenizer_of_another_model(clip: Any, saved: str, tmp_path: Path) -> None:
    save_tokenizer(tmp_path, [*WORDS, "surplus"])
    assert f"it knows {len(WORDS) + 1} tokens" in refusal(saved, clip.vision_model)


def test_checkpoints_that_are_none(clip: Any, saved: str, tmp_path: Path) -> None:
    tower = clip.vision_model
    assert "nowhere" in refusal(str(tmp_path / "nowhere"), tower)
    config = tmp_path / "config.json"
    whole = json.loads(config.read_text())
    config.write_text("{")
    assert "config.json" in refusal(saved, tower)
    config.write_text(json.dumps(whole | {"quantization_config": {"quant_method": "gptq"}}))
    assert "quantised (gptq)" in refusal(saved, tower)
    config.write_text(json.dumps(whole))
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    assert "the weights" in refusal(saved, tower)
    (tmp_path / "model.safetensors").unlink()
    assert "the weights" in refusal(saved, tower)


def test_a_checkpoint_of_the_vision_tower_alone(clip: Any, saved: str, tmp_path: Path) -> None:
    alone = CLIPVisionModel(clip.vision_model.config)
    alone.save_pretrained(tmp_path / "vision")
    assert "no 'clip'" in refusal(str(tmp_path / "vision"), clip.vision_model)
    state = {name: value for name, value in clip.state_dict().items() if "text" not in name}
    clip.save_pretrained(saved, state_dict=state)
    assert "is incomplete" in refusal(saved, clip.vision_model)
