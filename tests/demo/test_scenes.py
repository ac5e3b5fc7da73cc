"""The scenes: held-out strokes stay held out, and every question has the one right answer."""

from __future__ import annotations

import numpy as np
import pytest

from trio.demo.scenes import (
    CELL,
    CELL_NAMES,
    COLOURS,
    GRID,
    KINDS,
    MAX_OBJECTS,
    Scene,
    caption,
    handwriting,
    make_scene,
    patch_items,
    questions,
)


def scenes(count: int) -> list[Scene]:
    rng = np.random.default_rng(3)
    return [make_scene(rng, "heldout") for _ in range(count)]


def test_train_and_held_out_share_no_sample() -> None:
    train, train_labels = handwriting("train")
    held_out, held_out_labels = handwriting("heldout")
    seen = {image.tobytes() for image in train}
    assert not [image for image in held_out if image.tobytes() in seen]
    assert len(train) + len(held_out) == 1797
    assert set(train_labels) == set(held_out_labels) == set(range(10))


def test_same_seed_same_scene() -> None:
    first, second = (make_scene(np.random.default_rng(5), "train") for _ in range(2))
    assert [item.box for item in first.items] == [item.box for item in second.items]
    assert np.array_equal(first.pixels, second.pixels)


def test_items_are_distinct_and_stay_in_their_cells() -> None:
    for scene in scenes(60):
        assert 1 <= len(scene.items) <= MAX_OBJECTS
        assert len({item.digit for item in scene.items}) == len(scene.items)
        assert len({item.color for item in scene.items}) == len(scene.items)
        for item in scene.items:
            row, column = divmod(item.cell, GRID)
            left, top, right, bottom = item.box
            assert column * CELL <= left < right <= (column + 1) * CELL
            assert row * CELL <= top < bottom <= (row + 1) * CELL


def test_an_item_is_painted_in_its_colour() -> None:
    for scene in scenes(30):
        for item in scene.items:
            left, top, right, bottom = item.box
            box = scene.pixels[top:bottom, left:right].reshape(-1, 3).astype(float)
            distance = np.abs(box - np.array(COLOURS[item.color])).max(axis=1)
            assert np.mean(distance < 45) > 0.08


def test_questions_cover_every_kind_and_are_answered_from_the_items() -> None:
    rng = np.random.default_rng(0)
    for scene in scenes(40):
        asked = questions(rng, scene)
        assert {question.kind for question in asked} == set(KINDS)
        by_color = {item.color: item for item in scene.items}
        by_digit = {str(item.digit): item for item in scene.items}
        for question in asked:
            words = question.prompt.split()
            match question.kind:
                case "digit":
                    assert question.answer == str(by_color[words[-2]].digit)
                case "color":
                    assert question.answer == by_digit[words[-2]].color
                case "position":
                    assert question.answer == CELL_NAMES[by_digit[words[-2]].cell]
                case "presence":
                    assert question.answer == ("yes" if words[-2] in by_digit else "no")
                case "count":
                    assert question.answer == str(len(scene.items))


def test_caption_names_all_in_the_order_of_the_colours() -> None:
    three = next(scene for scene in scenes(40) if len(scene.items) == 3)
    first, second, third = (f"a {item.color} {item.digit}" for item in three.items)
    assert caption(three).answer == f"{first}, {second} and {third}"
    order = [list(COLOURS).index(item.color) for item in three.items]
    assert order == sorted(order)


def test_patch_items_mark_the_boxes() -> None:
    for scene in scenes(10):
        index = patch_items(scene, 8)
        side = GRID * CELL // 8
        assert index.shape == (side * side,)
        assert set(index) == {-1, *range(len(scene.items))}
        for number, item in enumerate(scene.items):
            left, top, right, bottom = item.box
            inside = np.flatnonzero(index == number)
            assert len(inside) == (right - left) * (bottom - top) // 64
            assert inside[0] == top // 8 * side + left // 8


def test_plain_scenes_are_white_on_an_even_ground() -> None:
    scene = make_scene(np.random.default_rng(2), "train", grid=1, plain=True)
    left, top, right, bottom = scene.items[0].box
    box = scene.pixels[top:bottom, left:right].astype(int)
    assert np.abs(box.max((0, 1)) - box.max()).max() < 60
    scene.pixels[top:bottom, left:right] = scene.pixels[-1, -1] if right < CELL else 0
    assert scene.pixels.std() < 40


@pytest.mark.parametrize("origin", [(0, 0), (1, 0), (1, 1)])
def test_a_part_of_the_grid_keeps_the_names_of_its_cells(origin: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        scene = make_scene(rng, "train", grid=2, origin=origin)
        assert scene.pixels.shape == (2 * CELL, 2 * CELL, 3)
        for item in scene.items:
            row, column = divmod(item.cell, GRID)
            assert item.box[0] // CELL == column - origin[1]
            assert item.box[1] // CELL == row - origin[0]
