"""Method eadp in the engine: what a text tower beside the encoder says of each image's tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.engine.support import by_id, picture
from tests.families.family import FAMILIES, LAYERS, Family, requests_of_many_sizes
from tests.tiny.clip import tiny_clip
from trio.engine.contexts import Contexts
from trio.engine.engine import Engine
from trio.engine.loading import load_text_tower
from trio.engine.request import Prepared, Request, Sampling
from trio.errors import UserError
from trio.families.registry import adapt
from trio.families.text_tower import TextTower
from trio.pruning import relevance
from trio.pruning.methods.eadp import of_tokens
from trio.pruning.options import Pruning

WORDS = ["!", "<", *"abcdefghijklmnopqrstuvwxyz", ">"]
EADP = Pruning(retention=1 / 4, method="eadp")


@pytest.fixture(scope="module", params=["llava", "llava_next"])
def family(request: Any) -> Family:
    return FAMILIES[request.param]()


def text_tower(model: Any) -> TextTower:
    """Of a CLIP that has the model's own vision tower."""
    vision = model.model.vision_tower
    size = len(WORDS)
    clip = tiny_clip(vision.config.to_dict(), words=size, begin=1, end=size - 1, joint=12, seed=4)
    clip.vision_model.load_state_dict(vision.state_dict())
    letters = Tokenizer(models.WordLevel({w: n for n, w in enumerate(WORDS)}, unk_token="!"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, bos_token="<", eos_token=">")
    return TextTower(clip, tokenizer)


def engine(family: Family, pruning: Pruning, **options: Any) -> Engine:
    own = text_tower(family.model)
    return Engine(family.model, family.processor, pruning=pruning, text_tower=own, **options)


@pytest.mark.parametrize("encoder", ["none", pytest.param("scan", marks=pytest.mark.slow)])
def test_a_batch_answers_as_its_requests_alone(family: Family, encoder: str) -> None:
    pruning = Pruning(retention=1 / 4, method="eadp", encoder=encoder)
    requests = requests_of_many_sizes(8, seed=2, max_new_tokens=6)
    late = by_id(engine(family, pruning, max_running=5, batch_tokens=150).generate(requests))
    worker = engine(family, pruning)
    for request in requests:
        (alone,) = worker.generate([request])
        assert late[request.id].token_ids == alone.token_ids
        assert late[request.id].kept_tokens == alone.kept_tokens
        prepared = worker.prepare(request)
        assert isinstance(prepared, Prepared)
        if prepared.image_tokens:
            stages = [worker._runner.pruning.stages(n, LAYERS) for n in prepared.image_tokens]
            assert alone.visual_tokens_stages == [sum(own[0][1] for own in stages)]


def test_what_is_kept_depends_on_the_prompt(family: Family) -> None:
    asked = ["which is red", "where is the cat", "how many"]
    requests = [Request(id=text, prompt=text, images=(picture(3),)) for text in asked]
    short = Sampling(max_new_tokens=1)
    found = by_id(engine(family, EADP, sampling=short).generate(requests))
    assert len({str(result.kept_tokens) for result in found.values()}) > 1


def test_tokens_are_those_of_eadp_by_its_steps() -> None:
    """Hidden states of the tower through its last norm and projection, whole texts and their
    tokens, a grid of patches, and the projector's features to choose among."""
    family = FAMILIES["llava"]()
    model, tower = family.model, text_tower(family.model)
    request = Request(id=0, prompt="a red cat", images=(picture(5),))
    worker = engine(family, EADP, sampling=Sampling(max_new_tokens=1))
    (result,) = worker.generate([request])
    prepared = worker.prepare(request)
    assert isinstance(prepared, Prepared)
    (image,) = prepared.image_inputs
    with torch.no_grad():
        states = model.model.vision_tower(image["pixel_values"], output_hidden_states=True)
    hidden_ND = states.hidden_states[model.config.vision_feature_layer][0, 1:]
    (text,) = tower.embed(["a red cat"])
    edge = round(len(hidden_ND) ** 0.5)
    importance_N = relevance.importance(
        tower.project(hidden_ND),
        text.tokens_CLP,
        text.pooled_CP,
        ((edge, edge),),
        mask_ML=text.mask_CL,
    )
    (features,) = adapt(model).encode_images([image])
    ((_, keep),) = EADP.stages(len(hidden_ND), LAYERS)
    chosen = relevance.select(importance_N, features.tokens, keep)
    assert result.kept_tokens == [sorted(chosen.tolist())]


def test_newlines_matter_to_no_prompt_and_tiles_are_told_apart() -> None:
    family = FAMILIES["llava_next"]()
    tower, adapter = text_tower(family.model), adapt(family.model)
    worker = engine(family, EADP)
    prepared = worker.prepare(Request(id=0, prompt="a", images=(picture(1, (60, 30)),)))
    assert isinstance(prepared, Prepared)
    (image,) = adapter.encode_images(prepared.image_inputs, join=tower.project)
    ((context,),) = contexts(worker)([task("a cat")], [[image]])
    tile_V = context.tiles_V
    assert tile_V is not None and context.grids is not None and len(context.grids) > 1
    importance_V = of_tokens(torch.ones(sum(r * c for r, c in context.grids)), context)
    assert len(importance_V) == len(tile_V) == len(image)
    newline_V = context.places_V < 0
    assert 0 < newline_V.sum() < len(image)
    assert (importance_V[newline_V] == 0).all()
    assert (importance_V[~newline_V] > 0).all()
    # The whole image comes first.
    rows, columns = context.grids[0]
    assert (tile_V[: rows * columns] == 0).all()
    assert (tile_V[rows * columns :] > 0).all()


def contexts(worker: Engine) -> Contexts:
    own = worker._runner._contexts
    assert own is not None
    return own


def task(prompt: str) -> Any:
    return SimpleNamespace(prepared=SimpleNamespace(prompt=prompt))


def test_a_prompt_is_embedded_once() -> None:
    family = FAMILIES["llava"]()
    worker, asked = engine(family, EADP), []
    tower = contexts(worker).text_tower
    assert tower is not None
    embed = tower.embed
    tower.embed = lambda texts: asked.append(list(texts)) or embed(texts)  # type: ignore
    prepared = worker.prepare(Request(id=0, prompt="a", images=(picture(1),)))
    assert isinstance(prepared, Prepared)
    (image,) = adapt(family.model).encode_images(prepared.image_inputs, join=tower.project)
    first = [task(prompt) for prompt in ("a", "b", "a", "text alone")]
    contexts(worker)(first, [[image], [image], [image], []])
    contexts(worker)([task("b"), task("c")], [[image], [image, image]])
    assert asked == [["a", "b"], ["c"]]


def test_without_a_text_tower_it_is_refused() -> None:
    family = FAMILIES["llava"]()
    with pytest.raises(UserError, match="--text-tower"):
        Engine(family.model, family.processor, pruning=EADP)
    Engine(family.model, family.processor, pruning=Pruning(retention=1.0, method="eadp"))
    other = FAMILIES["qwen2_5_vl"]()
    with pytest.raises(UserError, match="no CLIP vision encoder"):
        load_text_tower(other.model, "anywhere")
    with pytest.raises(UserError, match="needs a CLIP vision encoder"):
        Engine(other.model, other.processor, pruning=EADP)
