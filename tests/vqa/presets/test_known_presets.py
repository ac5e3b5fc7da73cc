"""Every preset over invented rows in its data set's schema."""

import json
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trio.errors import UserError
from trio.vqa.aggregates import METRICS, aggregate
from trio.vqa.presets.preset import Preset, Question
from trio.vqa.presets.preset_file import known_presets, preset_named

SAMPLES = Path(__file__).parents[1] / "samples"
FILES = {"gqa": "gqa_instructions"}
"""Of presets whose sample has another name."""
SIZE = 96, 64
"""Of the pictures in the samples."""
SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."

PROMPTS: dict[str, dict[int, str]] = {
    "pope": {0: f"Is there a kite in the image?\n{SHORT}"},
    "mme": {
        0: f"Is there a kite in this image?\n{SHORT}",
        5: f"Is the output of the code 5?\n{SHORT}",
    },
    "gqa": {0: f"What color is the kite?\n{SHORT}"},
    "vqav2": {
        1: f"Is there a boat?\n{SHORT}",
        3: f"What is on the water? (as in the test split: no answers)\n{SHORT}",
    },
    "textvqa": {1: f"when does it open?\nReference OCR token: HARBOUR, CAFE, open, 9-17\n{SHORT}"},
    "vizwiz": {
        0: "What is this?\nWhen the provided information is insufficient, respond with "
        f"'Unanswerable'.\n{SHORT}"
    },
    "scienceqa": {
        0: "Context: N/A\nQuestion: Which two shapes are alike?\nOptions: (A) the circles "
        f"(B) the square and a circle\n{LETTER}",
        2: "Context: The picture shows a boat.\nQuestion: What carries the boat?\nOptions: "
        f"(A) sand (B) water (C) air (D) ice\n{LETTER}",
    },
    "mmbench_en": {
        0: f"How many circles are there?\nA. 1\nB. 2\nC. 3\n{LETTER}",
        4: "Look at the colors.\nWhich shape is black?\nA. a circle\nB. the square\n" + LETTER,
    },
    "mmbench_cn": {1: "图中有几个圆形？\nA. 2\nB. 3\nC. 1\n请直接回答选项字母。"},
    "mmbench_cc": {
        0: "图中黑色的是什么？\nA. 圆形\nB. 三角形\nC. 方形\nD. 星形\n请直接回答选项字母。"
    },
    "seed": {
        0: f"How many circles are in the image?\nA. One\nB. Two\nC. Three\nD. Four\n{LETTER}",
        2: "What does the boat do?\nA. It flies\nB. It sinks\nC. It burns\nD. It stays\n" + LETTER,
    },
    "docvqa": {0: f"What is the invoice number?\n{SHORT}"},
    "infovqa": {1: f"What share are boats?\n{SHORT}"},
    "chartqa": {3: f"What share of the sum is blue?\n{SHORT}"},
    "ocrbench": {0: "what is written in the image?"},
    "mmstar": {
        0: f"How many circles are there?\nOptions: A: 1, B: 2, C: 3, D: 4\n{LETTER}",
    },
    "ai2d": {0: f"Which shape is black?\nA. circle\nB. square\nC. star\nD. none\n{LETTER}"},
    "coco_caption": {1: "Provide a one-sentence caption for the provided image."},
    "refcoco": {
        4: "Where in the image is what the phrase below describes? Answer with its box as "
        "[x1, y1, x2, y2]: the left, top, right and bottom edge, each as a number from 0 to 1, "
        "where 1 is the width or height of the image.\nPhrase: green ball far left"
    },
    "chair": {2: "Please describe this image in detail."},
}
"""Of some questions of each sample, by their place."""

KEYS: dict[str, Any] = {
    "pope": "0",
    "mme": "existence/existence/0001.jpg/Is there a kite in this image? Please answer yes or no.",
    "gqa": "900001",
    "vqav2": 901000,
    "textvqa": "aa01/34900",
    "vizwiz": "VizWiz_val_09000001",
    "scienceqa": None,
    "mmbench_en": "5",
    "mmbench_cn": 5,
    "mmbench_cc": 3,
    "seed": "800001",
    "docvqa": "70001",
    "infovqa": "60001",
    "chartqa": None,
    "ocrbench": None,
    "mmstar": 0,
    "ai2d": None,
    "coco_caption": "000000990001.jpg",
    "refcoco": "500001",
    "chair": "990001",
}
"""Of the first row of each sample."""

Answer = Callable[[dict[str, Any]], str]


def of_field(fields: dict[str, Any]) -> str:
    return str(fields["answer"])


def most_common(fields: dict[str, Any]) -> str:
    return Counter[str](fields["answers"]).most_common(1)[0][0]


def letter(fields: dict[str, Any]) -> str:
    return "ABCDE"[int(fields["answer"])]


RIGHT: dict[str, tuple[Answer, dict[str, float]]] = {
    "pope": (of_field, {"accuracy": 1, "f1": 1, "random/f1": 1, "yes_ratio": 0.5, "n": 6}),
    "mme": (of_field, {"existence": 200, "color": 200, "code_reasoning": 200, "total": 600}),
    "gqa": (of_field, {"accuracy": 1, "binary": 1, "open": 1, "n": 4}),
    "vqav2": (most_common, {"accuracy": 1, "answer_type/number": 1, "n": 3}),
    "textvqa": (most_common, {"accuracy": 1, "n": 3}),
    "vizwiz": (most_common, {"accuracy": 1, "n": 3}),
    "scienceqa": (letter, {"accuracy": 1, "image_accuracy": 1, "n": 3}),
    "mmbench": (of_field, {"accuracy": 1, "vanilla": 1, "rows": 1}),
    "seed": (of_field, {"accuracy": 1, "image": 1, "video": 1, "question_type/10": 1}),
    "docvqa": (lambda fields: fields["answers"][-1], {"anls": 1}),
    "chartqa": (of_field, {"accuracy": 1, "human": 1, "augmented": 1, "n": 4}),
    "ocrbench": (lambda fields: fields["answers"][0], {"points": 4, "accuracy": 1}),
    "mmstar": (of_field, {"accuracy": 1, "category/math": 1, "l2_category/object counting": 1}),
    "ai2d": (letter, {"accuracy": 1, "n": 3}),
    "captions": (lambda fields: fields["references"][0], {"bleu_4": 1, "rouge_l": 1, "n": 3}),
    "refcoco": (lambda fields: str(fields["box"]), {"accuracy@0.9": 1, "iou": 1, "n": 6}),
    "chair": (lambda fields: "", {"chair_i": 0, "chair_s": 0, "recall": 1, "n": 3}),
}
"""Of each metric, what answers a question rightly, and the figures when all are."""


def sample(name: str) -> pa.Table:
    return pq.read_table(SAMPLES / f"{FILES.get(name, name)}.parquet")


def rows_of(preset: Preset) -> list[dict[str, Any]]:
    """As a job reads them: the preset's columns, and whether there is a picture."""
    table = sample(preset.name)
    rows = table.select([name for name in table.schema.names if name in preset.columns]).to_pylist()
    if preset.image in table.schema.names:
        for row, image in zip(rows, table[preset.image].to_pylist(), strict=True):
            row[preset.image] = None if image is None else True
    return rows


def asked(name: str) -> list[Question]:
    preset = preset_named(name)
    return [question for row in rows_of(preset) for question in preset.questions(row)]


def completed(fields: dict[str, Any]) -> dict[str, Any]:
    """With what a job makes of the fields, and of an answer that is right."""
    if "box_pixels" in fields:
        sides = [pixel / side for pixel, side in zip(fields["box_pixels"], SIZE * 2, strict=True)]
        return fields | {"box": sides}
    return fields | {"mentioned": fields["present"]} if "present" in fields else fields


def test_every_preset_is_tested() -> None:
    assert list(known_presets()) == list(PROMPTS) == list(KEYS)
    assert {preset.metric for preset in known_presets().values()} == set(RIGHT)


@pytest.mark.parametrize("name", PROMPTS)
def test_columns_are_there(name: str) -> None:
    preset, schema = preset_named(name), sample(name).schema
    preset.check(schema, "sample")
    assert preset.columns - set(schema.names) <= set(preset.optional)
    for lacking in preset.columns & set(schema.names):
        with pytest.raises(UserError, match=f"^file: preset '{name}' needs '{lacking}', but the"):
            preset.check(schema.remove(schema.get_field_index(lacking)), "file")


@pytest.mark.parametrize("name", KEYS)
def test_keys(name: str) -> None:
    preset = preset_named(name)
    keys = [preset.key(row) for row in rows_of(preset)]
    assert keys[0] == KEYS[name] and type(keys[0]) is type(KEYS[name])
    assert len(set(keys)) == (1 if KEYS[name] is None else len(keys))


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts(name: str) -> None:
    questions = asked(name)
    for place, prompt in PROMPTS[name].items():
        assert questions[place].prompt == prompt


@pytest.mark.parametrize("name", PROMPTS)
def test_right_answers_get_full_marks(name: str) -> None:
    questions, metric = asked(name), preset_named(name).metric
    assert metric is not None
    right, figures = RIGHT[metric]
    rows = [completed(each.fields) for each in questions]
    scored = [row for row in rows if {*METRICS[metric].fields} - {"prediction"} <= row.keys()]
    found = aggregate(metric, [row | {"prediction": right(row)} for row in scored])
    wanted = figures if name != "infovqa" else {"anls": 1, "n": 2}
    assert {key: found[key] for key in wanted} == pytest.approx(wanted)
    assert json.loads(json.dumps([each.fields for each in questions])) == [
        each.fields for each in questions
    ]


@pytest.mark.parametrize("name", PROMPTS)
def test_presets_go_to_other_processes(name: str) -> None:
    preset = preset_named(name)
    copy = pickle.loads(pickle.dumps(preset))
    assert copy == preset
    assert [copy.questions(row) for row in rows_of(preset)] == [
        preset.questions(row) for row in rows_of(preset)
    ]
