"""What is easily got wrong in each data set."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from trio.errors import UserError
from trio.vqa.presets.preset import PictureJoin, Preset
from trio.vqa.presets.preset_file import preset_named

SAMPLES = Path(__file__).parents[1] / "samples"


def rows(file: str) -> list[dict[str, Any]]:
    return [dict(row) for row in pq.read_table(SAMPLES / f"{file}.parquet").to_pylist()]


def fields_of(preset: Preset, row: dict[str, Any]) -> dict[str, Any]:
    (question,) = preset.questions(row)
    return question.fields


def test_pope_question_ids_name_three_rows() -> None:
    table = rows("pope")
    assert len({row["question_id"] for row in table}) == 2
    assert len({preset_named("pope").key(row) for row in table}) == 6


def test_mme_pairs_keep_their_question_id() -> None:
    preset, table = preset_named("mme"), rows("mme")
    fields = [fields_of(preset, row) for row in table]
    assert fields[0] == {
        "answer": "Yes", "category": "existence", "question_id": "existence/0001.jpg",
    }  # fmt: skip
    assert fields[1]["question_id"] == fields[0]["question_id"]
    assert preset.key(table[0]) != preset.key(table[1])


def test_gqa_pictures_are_joined() -> None:
    preset = preset_named("gqa")
    assert preset.images == PictureJoin(
        config="testdev_balanced_images", key="id", by="imageId", image="image"
    )
    assert "imageId" in preset.columns
    schema = pq.read_schema(SAMPLES / "gqa_images.parquet")
    preset.check_pictures(schema, "pictures")
    with pytest.raises(UserError, match=r"^pictures: preset 'gqa' needs 'image', but the columns"):
        preset.check_pictures(schema.remove(1), "pictures")
    pictures = {row["id"] for row in rows("gqa_images")}
    assert {row["imageId"] for row in rows("gqa_instructions")} <= pictures
    assert fields_of(preset, rows("gqa_instructions")[0]) == {
        "answer": "red", "structural": "query",
    }  # fmt: skip


def test_vqav2_without_answers_is_asked_and_not_scored() -> None:
    preset, table = preset_named("vqav2"), rows("vqav2")
    assert fields_of(preset, table[0])["answers"] == ["red"] * 8 + ["pink"] * 2
    assert "answers" not in fields_of(preset, table[3])
    assert "answers" not in fields_of(preset, table[0] | {"answers": []})
    assert fields_of(preset, table[0] | {"answers": ["red", "pink"]})["answers"] == ["red", "pink"]


def test_answers_may_be_one_text() -> None:
    row = rows("textvqa")[0] | {"answers": "harbour", "question_id": "34900"}
    assert fields_of(preset_named("textvqa"), row)["answers"] == ["harbour"]
    assert preset_named("textvqa").key(row) == "aa01/34900"


def test_mmbench_nan_is_missing() -> None:
    preset, table = preset_named("mmbench_en"), rows("mmbench_en")
    assert fields_of(preset, table[1]) == {
        "index": "1000005",
        "answer": "A",
        "choices": ["2", "3", "1"],
        "category": "object_localization",
        "l2_category": "finegrained_perception (instance-level)",
    }
    assert "answer" not in fields_of(preset, table[0] | {"answer": "nan"})
    assert "answer" not in fields_of(
        preset_named("mmbench_cn"), rows("mmbench_cn")[0] | {"answer": None}
    )


def test_mmbench_index_is_text_or_number() -> None:
    assert fields_of(preset_named("mmbench_cn"), rows("mmbench_cn")[2])["index"] == 2000005
    assert preset_named("mmbench_en").key(rows("mmbench_en")[2]) == "2000005"


def test_mmbench_cc_may_have_hints() -> None:
    preset, row = preset_named("mmbench_cc"), rows("mmbench_cc")[0]
    assert "l2_category" not in fields_of(preset, row)
    (question,) = preset.questions(row | {"hint": "看图。"})
    assert question.prompt.startswith("看图。\n图中黑色的是什么？\nA. 圆形\n")


def test_scienceqa_says_which_questions_have_a_picture() -> None:
    preset = preset_named("scienceqa")
    assert [fields_of(preset, row)["image"] for row in rows("scienceqa")] == [True, False, True]
    assert "image" not in preset.columns


def test_seed_asks_about_pictures_and_videos() -> None:
    preset = preset_named("seed")
    assert [fields_of(preset, row)["data_type"] for row in rows("seed")] == [
        "image", "image", "video",
    ]  # fmt: skip
    assert fields_of(preset, rows("seed")[2])["question_type"] == 10


def test_refcoco_asks_about_each_phrase() -> None:
    preset = preset_named("refcoco")
    questions = [preset.questions(row) for row in rows("refcoco")]
    assert [len(each) for each in questions] == [3, 2, 1]
    assert [each.prompt.splitlines()[-1] for each in questions[0]] == [
        "Phrase: black square", "Phrase: the box on the right", "Phrase: right thing",
    ]  # fmt: skip
    assert questions[0][2].fields == {"box_pixels": [70.0, 20.0, 90.0, 44.0]}
    alone = rows("refcoco")[2] | {"answer": "the boat"}
    assert preset.questions(alone) == questions[2]
    assert preset.questions(alone | {"answer": None}) == []


def test_chair_keeps_an_empty_list_of_objects() -> None:
    row = rows("chair")[0] | {"gt_object": [], "question_id": 990001}
    assert fields_of(preset_named("chair"), row) == {"present": []}
    assert preset_named("chair").key(row) == 990001


@pytest.mark.parametrize(
    ("name", "patterns"),
    [
        ("pope", ("data/test-*.parquet", "test-*.parquet")),
        ("mmbench_en", ("en/dev-*.parquet",)),
        ("infovqa", ("InfographicVQA/validation-*.parquet",)),
        ("gqa", ("testdev_balanced_instructions/testdev-*.parquet",)),
        ("mmstar", ("data/val-*.parquet", "val-*.parquet", "mmstar.parquet")),
    ],
)
def test_patterns(name: str, patterns: tuple[str, ...]) -> None:
    assert preset_named(name).patterns() == patterns


def test_picture_patterns() -> None:
    assert preset_named("gqa").picture_patterns() == ("testdev_balanced_images/testdev-*.parquet",)
    assert preset_named("pope").picture_patterns() == ()


def test_old_names_of_repositories_stand_second() -> None:
    assert preset_named("vizwiz").repositories == (
        "lmms-lab-encoder/VizWiz-VQA", "lmms-lab/VizWiz-VQA",
    )  # fmt: skip
    assert preset_named("ocrbench").repositories == ("echo840/OCRBench",)


def test_a_file_without_pictures_is_refused() -> None:
    schema = pq.read_schema(SAMPLES / "chair.parquet")
    with pytest.raises(UserError, match="needs 'image', but the columns are question_id, gt_obj"):
        preset_named("chair").check(schema.remove(schema.get_field_index("image")), "file")


BROKEN: dict[str, tuple[str, str, Callable[[dict[str, Any]], Any], str]] = {
    "a box of three numbers": (
        "refcoco", "refcoco", lambda row: row | {"bbox": [1.0, 2.0, 3.0]},
        "^field 'box_pixels': 'bbox' is not x, y, width, height",
    ),
    "a struct for an answer": (
        "chartqa", "chartqa", lambda row: row | {"answer": {"text": "20"}},
        "^field 'answer': 'answer' holds a struct; name one of its fields",
    ),
    "no such field of a struct": (
        "gqa", "gqa_instructions", lambda row: row | {"types": {"semantic": "attr"}},
        "^field 'structural': 'types.structural': no 'structural' among semantic",
    ),
    "structs where texts are meant": (
        "docvqa", "docvqa", lambda row: row | {"answers": [{"answer": "4107"}]},
        "^field 'answers': 'answers' is no text or number but a struct",
    ),
    "no question": (
        "pope", "pope", lambda row: row | {"question": None}, "^prompt: 'question' is missing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_rows_say_what_is_wrong(case: str) -> None:
    name, file, broken, message = BROKEN[case]
    with pytest.raises(UserError, match=message):
        preset_named(name).questions(broken(rows(file)[0]))


def test_a_row_without_its_id_is_refused() -> None:
    with pytest.raises(UserError, match=r"^a row has no 'question_id', which is part of its id"):
        preset_named("textvqa").key(rows("textvqa")[0] | {"question_id": None})
