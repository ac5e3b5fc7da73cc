"""`patch` on prompts with videos, alone, beside images and beside text."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache

import trio
from tests.every_family.family import FAMILIES, LAYERS
from tests.every_family.videos import FRAME_TOKENS, WRITERS, OnevisionWriter, Row, joined
from tests.patching.prompts import assert_keeps_its_answers, run
from trio.decoder.cache_argument import CACHE, cache_of
from trio.errors import UserError
from trio.families.registry import adapt
from trio.patching import forward
from trio.patching.forward import repeats_by_prompt
from trio.prefill import Prefilled, prefill
from trio.pruning import reference

PROMPTS = ["wvwww", "wwwww", "wiwvwwwww", "wviwvww", "iiww", "wvvwwwwwww"]
"""Of LLaVA-OneVision, neighbours have nothing between them."""
PRUNING = trio.Pruning(retention=0.4)
SCHEDULE = {0: 12, 1: 9, 2: 7, 4: 3}
"""Before, between and behind the layers of Qwen3-VL that get more of an image."""
STAGES = trio.Pruning(schedule=",".join(f"{layer}:{keep}" for layer, keep in SCHEDULE.items()))


@pytest.fixture(scope="module", params=WRITERS)
def name(request: Any) -> str:
    return request.param


@pytest.fixture(scope="module")
def family_model(name: str) -> Any:
    return FAMILIES[name]().model


@pytest.fixture
def model(family_model: Any) -> Any:
    return copy.deepcopy(family_model)


@pytest.fixture(scope="module")
def unpruned(name: str, family_model: Any) -> list[torch.Tensor]:
    """Logits of each row alone."""
    rows = WRITERS[name](family_model).rows(PROMPTS)
    return [run(family_model, row.inputs)[1] for row in rows]


@pytest.fixture
def rows(name: str, family_model: Any) -> list[Row]:
    return WRITERS[name](family_model).rows(PROMPTS)


def test_prompts_are_as_the_model_takes_them(model: Any, rows: list[Row]) -> None:
    adapter = adapt(model)
    assert adapter.video_token_id == model.config.video_token_id
    assert sum(len(row.videos) for row in rows) >= 5
    for row in rows:
        assert (run(model, row.inputs)[0]).shape == (1, 6)
        if "pixel_values_videos" in row.inputs:
            counts = adapter.video_tokens(row.inputs)
            found = adapter.video_spans(row.inputs["input_ids"][0], counts)
            assert found == [row.spans[index] for index in row.videos]


def test_one_that_keeps_all_answers_as_unpatched_and_goes_on(model: Any, rows: list[Row]) -> None:
    assert_keeps_its_answers(model, lambda side: joined(rows, side))


@pytest.mark.parametrize(
    ("pruning", "side"), [(PRUNING, "right"), (STAGES, "left")], ids=["retention", "schedule"]
)
def test_a_batch_equals_singles(
    model: Any, rows: list[Row], unpruned: list[torch.Tensor], pruning: trio.Pruning, side: str
) -> None:
    trio.patch(model, pruning)
    new, logits, cache = run(model, joined(rows, side))
    for index, row in enumerate(rows):
        alone = run(model, row.inputs)
        assert torch.equal(new[index, None], alone[0])
        torch.testing.assert_close(logits[index, None], alone[1], atol=1e-4, rtol=1e-4)
        pruned = not torch.allclose(alone[1], unpruned[index], atol=1e-3)
        assert pruned == bool(row.spans)
        if row.spans:
            for together, single in zip(cache.layers, alone[2].layers, strict=True):
                assert together.lengths_B[index] == single.lengths_B[0]


def test_each_layer_holds_what_the_schedule_leaves_of_each_run(model: Any, rows: list[Row]) -> None:
    trio.patch(model, STAGES)
    cache = run(model, joined(rows), max_new_tokens=1)[2]
    for index, row in enumerate(rows):
        length = row.inputs["input_ids"].shape[1]
        for layer, held in enumerate(cache.layers):
            keep = min(count for stage, count in SCHEDULE.items() if stage <= layer)
            gone = sum(max(0, stop - start - keep) for start, stop in row.spans)
            assert held.lengths_B[index] == length - gone


@pytest.mark.parametrize("index", [3, 5])
def test_a_prompt_gives_what_the_textbook_does(model: Any, rows: list[Row], index: int) -> None:
    """Of embeddings, positions and what is injected as transformers hands them to the decoder."""
    row, adapter, calls = rows[index], adapt(model), []
    text = model.model.language_model
    hook = text.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    run(model, row.inputs, max_new_tokens=1)
    hook.remove()
    positions = calls[0]["position_ids"]
    if adapter.decoder.position_axes > 1:
        positions = positions[-adapter.decoder.position_axes :, 0]
    own, head = reference.text_parts(model, torch.float32)
    # Of a video's tokens nobody says where they lie.
    coordinates = torch.zeros(calls[0]["inputs_embeds"].shape[1], 2)
    pictures = [span for number, span in enumerate(row.spans) if number not in row.videos]
    if pictures:
        for (start, stop), image in zip(pictures, adapter.coordinates(row.inputs), strict=True):
            coordinates[start:stop] = image
    book = reference.prefill(
        own,
        head,
        calls[0]["inputs_embeds"][0],
        row.spans,
        [STAGES.stages(stop - start, LAYERS) for start, stop in row.spans],
        reference.Rules(position_ids=adapter.default_position_ids),
        positions=positions if positions.ndim == 2 and len(positions) > 1 else None,
        coordinates=coordinates,
        injected=calls[0].get("deepstack_visual_embeds") or (),
    )
    trio.patch(model, STAGES)
    _, logits, cache = run(model, row.inputs, max_new_tokens=1)
    torch.testing.assert_close(logits[0, 0], book.logits_U, atol=2e-4, rtol=2e-4)
    assert [int(layer.lengths_B[0]) for layer in cache.layers] == book.lengths
    assert [int(layer.positions_B[0]) for layer in cache.layers] == book.next_positions


def test_a_call_of_the_model_itself_prunes_as_generate_does(model: Any, rows: list[Row]) -> None:
    inputs = joined(rows)
    trio.patch(model, PRUNING)
    _, logits, cache = run(model, inputs, max_new_tokens=1)
    out = model(**inputs, logits_to_keep=1)
    torch.testing.assert_close(out.logits[:, 0], logits[:, 0])
    for one, other in zip(cache_of(out).layers, cache.layers, strict=True):
        assert torch.equal(one.lengths_B, other.lengths_B)
        assert torch.equal(one.positions_B, other.positions_B)


def test_beams_keep_the_videos_of_their_prompt(model: Any, rows: list[Row]) -> None:
    trio.patch(model, PRUNING)
    options = {"max_new_tokens": 4, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    if not repeats_by_prompt(model):
        with pytest.raises(UserError, match="mixes up the"):
            model.generate(**joined(rows), **options)
        rows = [rows[0], rows[1]]
    together = joined(rows)
    out = model.generate(**together, **options)[:, together["input_ids"].shape[1] :]
    for index, row in enumerate(rows):
        alone = model.generate(**row.inputs, **options)[:, row.inputs["input_ids"].shape[1] :]
        assert torch.equal(out[2 * index : 2 * index + 2, : alone.shape[1]], alone)


def test_videos_that_are_encoded_already(model: Any, rows: list[Row]) -> None:
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        pytest.skip("this transformers takes pixels only")
    inputs = joined(rows)
    trio.patch(model, PRUNING)
    wanted = run(model, inputs)
    pixels = inputs.pop("pixel_values_videos")
    grids = [inputs["video_grid_thw"]] if "video_grid_thw" in inputs else []
    inputs["mm_encoder_outputs"] = {"video": model.get_video_features(pixels, *grids)}
    got = run(model, inputs)
    assert torch.equal(got[0], wanted[0])
    torch.testing.assert_close(got[1], wanted[1])


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl"], indirect=True, scope="module")
def test_what_repeats_from_frame_to_frame_is_dropped(
    name: str, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So as many tokens as a frame has are all of different places, where the most salient ones
    are not."""
    writer = WRITERS[name](model)
    (row,) = writer.rows(["wvww"])
    (start, stop) = row.spans[0]
    per_frame = FRAME_TOKENS if name == "llava_onevision" else (stop - start) // 3
    pixels = row.inputs["pixel_values_videos"]
    frames = pixels[0] if name == "llava_onevision" else pixels.view(3, -1, pixels.shape[1])
    frames[1:] = frames[0]
    found: list[Prefilled] = []

    def note(*args: Any) -> Prefilled:
        found.append(prefill(*args))
        return found[-1]

    monkeypatch.setattr(forward, "prefill", note)
    places = []
    for method in ("trio", "gradient"):
        trio.patch(model, trio.Pruning(schedule=f"0:{per_frame}", method=method))
        run(model, row.inputs, max_new_tokens=1)
        kept = found[-1].kept[0][0]
        newline = -1
        places.append(len({t % per_frame if t < 3 * per_frame else newline for t in kept}))
    assert places[0] == per_frame > places[1]


def test_what_cannot_be_pruned_says_so(name: str, model: Any, rows: list[Row]) -> None:
    inputs = rows[0].inputs
    trio.patch(model, PRUNING)
    options: dict[str, dict[str, Any]] = {
        "prefill_chunk_size": {"prefill_chunk_size": 16},
        "use_cache": {"use_cache": False},
        "output_attentions": {"output_attentions": True, "return_dict_in_generate": True},
    }
    for named, option in options.items():
        with pytest.raises(UserError, match=named):
            model.generate(**inputs, max_new_tokens=4, do_sample=False, **option)
    with pytest.raises(UserError, match="logits for its last token only"):
        model(**inputs)
    cache = run(model, rows[1].inputs, cache=DynamicCache())[2]
    with pytest.raises(UserError, match="videos on top of a filled cache"):
        model(**inputs, **{CACHE: cache}, logits_to_keep=1)
    short = {**inputs, "input_ids": inputs["input_ids"].clone()}
    short["input_ids"][0, rows[0].spans[0][0]] = 20
    with pytest.raises(UserError, match="video placeholder tokens but its 1 videos give"):
        model(**short, logits_to_keep=1)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"], indirect=True, scope="module")
def test_videos_whose_places_nobody_tells_are_refused(
    name: str, model: Any, rows: list[Row]
) -> None:
    inputs = joined(rows)
    trio.patch(model, PRUNING)
    logits = run(model, inputs, max_new_tokens=1)[1]
    untyped = {key: inputs[key] for key in inputs if key != "mm_token_type_ids"}
    for call in (lambda: run(model, untyped), lambda: model(**untyped, logits_to_keep=1)):
        with pytest.raises(UserError, match="videos without mm_token_type_ids"):
            call()
    positions, _ = model.model.get_rope_index(**inputs)
    out = model(**untyped, position_ids=positions, logits_to_keep=1)
    torch.testing.assert_close(out.logits, logits)
    ungridded = {key: inputs[key] for key in inputs if key != "video_grid_thw"}
    with pytest.raises(UserError, match="videos without video_grid_thw"):
        model(**ungridded, logits_to_keep=1)
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        return
    row = rows[0].inputs
    video = model.get_video_features(row["pixel_values_videos"], row["video_grid_thw"])
    encoded = {key: row[key] for key in ("input_ids", "attention_mask", "mm_token_type_ids")}
    encoded["mm_encoder_outputs"] = {"video": video}
    with pytest.raises(UserError, match="does not find"):
        model(**encoded, logits_to_keep=1)


@pytest.mark.parametrize("name", ["llava", "llava_next"], indirect=True, scope="module")
def test_families_without_videos_refuse_them(name: str, model: Any) -> None:
    trio.patch(model, PRUNING)
    ids = torch.arange(10, 20)[None]
    pixels = torch.zeros(1, 2, 3, 8, 8)
    with pytest.raises(UserError, match="videos are not pruned in this family"):
        model(input_ids=ids, pixel_values_videos=pixels, logits_to_keep=1)
    with pytest.raises(UserError, match="videos are not pruned in this family"):
        model.generate(input_ids=ids, pixel_values_videos=pixels, num_beams=2)


@pytest.mark.parametrize("name", ["llava_onevision"], indirect=True, scope="module")
def test_a_video_of_more_tokens_than_any_image(model: Any) -> None:
    (row,) = OnevisionWriter(model, frames=20).rows(["wvww"])
    length = row.inputs["input_ids"].shape[1]
    assert length - 3 == 20 * FRAME_TOKENS + 1 > adapt(model).max_visual_tokens
    held = []
    for pruning in (trio.Pruning(schedule="1:170,3:20"), PRUNING):
        trio.patch(model, pruning)
        cache = run(model, row.inputs, max_new_tokens=1)[2]
        held.append([int(layer.lengths_B[0]) - 3 for layer in cache.layers])
    assert held[0] == [181, 170, 170, 20, 20, 20]
    assert sum(held[1]) == pytest.approx(0.4 * LAYERS * 181, abs=LAYERS)
