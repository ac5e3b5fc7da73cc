import pytest
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, StaticCache

from tests.tiny.llava import tiny_llava
from trio.errors import UserError
from trio.patching.cache import GROWTH, RaggedLayer, make_plain, make_ragged, ragged_layers

LENGTHS = (3, 1, 2)


def filled() -> tuple[RaggedLayer, torch.Tensor]:
    layer = RaggedLayer(DynamicLayer())
    packed = torch.randn(1, 2, sum(LENGTHS), 4, generator=torch.Generator().manual_seed(0))
    layer.store(packed, -packed, LENGTHS)
    layer.place([10, 20, 30], logical=7, group=0)
    return layer, packed


def row(layer: RaggedLayer, index: int) -> torch.Tensor:
    assert layer.keys is not None
    return layer.keys[index, :, : int(layer.lengths_B[index])]


def step(layer: RaggedLayer, keys: torch.Tensor, active: torch.Tensor) -> None:
    layer.append(keys, -keys)
    layer.advance(layer.lengths_B + active, layer.positions_B + active)


def test_rows_keep_their_own_length_while_they_grow() -> None:
    layer, packed = filled()
    assert layer.get_seq_length() == 7
    steps = [torch.full((1, 2, 3, 4), float(i)) for i in range(2 * GROWTH)]
    for keys in steps:
        step(layer, keys, torch.ones(3, dtype=torch.long))
    assert layer.get_seq_length() == 7 + 2 * GROWTH
    assert layer.lengths_B.tolist() == [n + 2 * GROWTH for n in LENGTHS]
    assert layer.positions_B.tolist() == [10 + 2 * GROWTH, 20 + 2 * GROWTH, 30 + 2 * GROWTH]
    for index, prompt in enumerate(packed[0].split(LENGTHS, dim=1)):
        grown = torch.cat([prompt, *(keys[0, :, index, None] for keys in steps)], dim=1)
        assert torch.equal(row(layer, index), grown)


def test_a_row_without_a_token_overwrites_what_it_got() -> None:
    layer, _ = filled()
    before = row(layer, 1).clone()
    step(layer, torch.full((1, 2, 3, 4), 5.0), torch.tensor([1, 0, 1]))
    step(layer, torch.full((1, 2, 3, 4), 6.0), torch.tensor([1, 1, 1]))
    assert layer.lengths_B.tolist() == [5, 2, 4]
    assert torch.equal(row(layer, 1), torch.cat([before, torch.full((2, 1, 4), 6.0)], dim=1))
    assert row(layer, 0)[:, -2:, 0].tolist() == [[5.0, 6.0]] * 2


def test_appended_columns_cover_every_row() -> None:
    layer, _ = filled()
    keys, values = layer.append(torch.ones(1, 2, 3, 4), -torch.ones(1, 2, 3, 4))
    assert keys.shape == values.shape == (3, 2, 4, 4)
    for index, length in enumerate(LENGTHS):
        assert (keys[index, :, length] == 1).all()
        assert (values[index, :, length] == -1).all()


@pytest.mark.parametrize(
    ("change", "order"),
    [
        (lambda layer: layer.reorder_cache(torch.tensor([2, 2, 0])), [2, 2, 0]),
        (lambda layer: layer.batch_select_indices(torch.tensor([1])), [1]),
        (lambda layer: layer.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
        (lambda layer: layer.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ],
)
def test_rows_move_with_lengths_and_positions(change, order) -> None:  # type: ignore[no-untyped-def]
    layer, packed = filled()
    prompts = packed[0].split(LENGTHS, dim=1)
    change(layer)
    assert layer.lengths_B.tolist() == [LENGTHS[i] for i in order]
    assert layer.positions_B.tolist() == [(10, 20, 30)[i] for i in order]
    for index, source in enumerate(order):
        assert torch.equal(row(layer, index), prompts[source])


def test_only_a_plain_dynamic_cache_becomes_ragged() -> None:
    config = tiny_llava(layers=2).config.text_config
    for cache in (DynamicCache(), DynamicCache(config=config)):
        layers = make_ragged(cache, 2)
        assert cache.layers == ragged_layers(cache) == layers
        assert cache.get_seq_length() == 0
        make_plain(cache)
        assert not ragged_layers(cache)
        keys, _ = cache.update(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4), 1)
        assert keys.shape[2] == 3
    for unfit in (StaticCache(config=config, max_cache_len=8), None, ((1, 2),)):
        with pytest.raises(UserError, match="DynamicCache"):
            make_ragged(unfit, 2)  # type: ignore[arg-type]


def test_a_foreign_model_cannot_go_on_from_it() -> None:
    layer, _ = filled()
    with pytest.raises(UserError, match="pruned prompt"):
        layer.update(torch.ones(3, 2, 1, 4), torch.ones(3, 2, 1, 4))
    with pytest.raises(UserError, match="cropped"):
        layer.crop(-1)
    layer.crop(0)
    assert layer.get_seq_length() == 7
    layer.reset()
    assert layer.get_seq_length() == 0
    assert layer.keys is None
