"""Methods that compare images with the prompt in the decoder's own space, for decoders of all
families."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from tests.engine.support import MANY_SIZES, by_id, picture
from tests.every_family.family import ARCHITECTURES, FAMILIES, LAYERS, requests_of_many_sizes
from tests.every_family.test_engine import engine
from trio.engine.request import Prepared, Request, Sampling
from trio.errors import UserError
from trio.families.registry import adapt
from trio.patching import patch
from trio.pruning import reference
from trio.pruning.options import Pruning
from trio.pruning.scores.relevance import LANGUAGE, importance, instruction, select

EADP = Pruning(retention=0.3, method="eadp_llm")
CDPRUNER = Pruning(retention=0.3, method="cdpruner", method_options={"space": "language"})


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("pruning", [EADP, CDPRUNER], ids=lambda own: own.method)
def test_a_batch_answers_as_its_requests_alone(name: str, pruning: Pruning) -> None:
    family = FAMILIES[name]()
    requests = requests_of_many_sizes(6, seed=2, max_new_tokens=4)
    late = by_id(engine(family, pruning, max_running=5, batch_tokens=250).generate(requests))
    worker = engine(family, pruning)
    for request in requests:
        (alone,) = worker.generate([request])
        assert alone.error is None
        assert late[request.id].token_ids == alone.token_ids
        assert late[request.id].kept_tokens == alone.kept_tokens


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_kept_tokens_are_eadps_and_keep_their_positions_and_what_is_injected(name: str) -> None:
    """By its steps: features of the merger, the words' embeddings alone, the merged grid."""
    family = FAMILIES[name]()
    worker = engine(family, EADP, sampling=Sampling(max_new_tokens=1, first_logprobs=True))
    request = Request(id=0, prompt="where is red ?", images=(picture(4, (112, 84)),))
    (result,) = worker.generate([request])
    prepared, adapter = worker.prepare(request), adapt(family.model)
    assert isinstance(prepared, Prepared)
    (features,) = adapter.encode_images(prepared.image_inputs)
    words = adapter.decoder.embed(torch.tensor(prepared.instruction_ids))
    (layout,) = adapter.layouts(prepared.image_inputs[0])
    with torch.no_grad():
        importance_N = importance(features.tokens, *instruction(words), layout.grids, LANGUAGE)
    ((_, keep),) = EADP.stages(len(features), LAYERS)
    chosen = sorted(select(importance_N, features.tokens, keep).tolist())
    assert result.kept_tokens == [chosen]
    other = Request(id=1, prompt="how many", images=request.images)
    assert next(worker.generate([other])).kept_tokens != [chosen]
    spans = adapter.spans(prepared.input_ids, prepared.image_tokens)
    positions = adapter.positions([len(prepared.input_ids)], [spans], prepared.image_inputs)
    text, head = reference.text_parts(family.model, torch.float32)
    book = reference.prefill(
        text,
        head,
        adapter.embed(torch.tensor(prepared.input_ids), [features]),
        spans,
        [[(0, keep)]],
        reference.Rules(position_ids="keep"),
        choose=lambda state, places, goal: chosen,
        positions=positions,
        injected=features.injected,
    )
    expected = book.logits_U.log_softmax(dim=-1)
    torch.testing.assert_close(result.first_logprobs, expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", ["llava-siglip", *ARCHITECTURES])
def test_layouts_say_where_tokens_lie(name: str) -> None:
    """Row by row in each grid, as their coordinates have it; all else is no patch."""
    family, sizes = FAMILIES[name](), [(80, 40), *MANY_SIZES]
    worker, adapter = engine(family), adapt(family.model)
    for number, size in enumerate(sizes):
        prepared = worker.prepare(Request(prompt="a", images=(picture(number, size),)))
        assert isinstance(prepared, Prepared)
        (inputs,) = prepared.image_inputs
        (layout,), (lies_N2,) = adapter.layouts(inputs), adapter.coordinates(inputs)
        assert len(layout.places) == adapter.visual_tokens(inputs)[0]
        there = layout.places >= 0
        by_place = lies_N2[there][layout.places[there].argsort()]
        count = sum(rows * columns for rows, columns in layout.grids)
        assert sorted(layout.places[there].tolist()) == list(range(count))
        first = 0
        for rows, columns in filter(all, layout.grids):  # some have no feature without padding
            grid = by_place[first : first + rows * columns].view(rows, columns, 2)
            assert all((below > above).all() for above, below in pairwise(grid[..., 0]))
            assert (grid[..., 0] == grid[:, :1, 0]).all() and (grid[..., 1] == grid[:1, :, 1]).all()
            assert (grid[0, :, 1].diff() > 0).all()
            first += rows * columns


def test_without_words_or_without_text_it_is_refused() -> None:
    family = FAMILIES["qwen2_5_vl"]()
    (result,) = engine(family, EADP).generate([Request(prompt="", images=(picture(1),))])
    assert result.error is not None and "needs a prompt with words" in result.error
    with pytest.raises(UserError, match="no text for that"):
        patch(family.model, EADP)
    with pytest.raises(UserError, match="no option 'gamma'"):
        engine(family, Pruning(retention=0.3, method="eadp_llm", method_options={"gamma": 1}))
    with pytest.raises(UserError, match="one of joint, language"):
        engine(family, Pruning(retention=0.3, method="cdpruner", method_options="space=clip"))
