"""The sample of every data set through its preset and the whole job: a stand-in for the engine
gives right answers, so that figures are known."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import vqa

from tests.job.runs import execute, rows
from tests.vqa.knowing_engine import knowing
from tests.vqa.presets.test_known_presets import (
    FILES,
    KEYS,
    PROMPTS,
    RIGHT,
    SAMPLES,
    asked,
    completed,
    rows_of,
)
from trio.job.command import main
from trio.vqa.aggregates import METRICS
from trio.vqa.presets.preset_file import preset_named

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]
QUICK = ("gqa", "vqav2", "refcoco", "chair")
"""In the default suite: joined, without truth, exploded, with a vocabulary."""
WORDS = "kite\nboat\nsports ball, ball\nbook\n"
SENTENCES = [0, 1, 2, 0, 1, 0]
"""Of the RefCOCO sample's objects, numbered for each."""


def right_answers(name: str) -> dict[tuple[int, str], str]:
    """By row and prompt; of questions without a truth, anything."""
    preset = preset_named(name)
    return {
        (number, question.prompt): _right(str(preset.metric), question.fields)
        for number, row in enumerate(rows_of(preset))
        for question in preset.questions(row)
    }


def _right(metric: str, fields: dict[str, Any]) -> str:
    if not _has_truth(metric, fields):
        return "whatever"
    return (
        " and ".join(fields["present"])
        if metric == "chair"
        else RIGHT[metric][0](completed(fields))
    )


def _has_truth(metric: str, fields: Mapping[str, Any]) -> bool:
    return {*METRICS[metric].fields} - {"prediction"} <= completed(dict(fields)).keys()


def flags_of(name: str, tmp_path: Path) -> dict[str, Any]:
    """What the preset needs beside its name and file."""
    (tmp_path / "objects.txt").write_text(WORDS)
    needed: dict[str, dict[str, Any]] = {
        "gqa": {"pictures": (str(SAMPLES / "gqa_images.parquet"),)},
        "chair": {"objects": str(tmp_path / "objects.txt")},
    }
    return needed.get(name, {})


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in PROMPTS],
)
def test_a_sample_that_is_answered_rightly(name: str, tmp_path: Path) -> None:
    out, file = tmp_path / "out", SAMPLES / f"{FILES.get(name, name)}.parquet"
    factory = functools.partial(knowing, answers=right_answers(name))
    changes = {"preset": name, "mode": "generate", **flags_of(name, tmp_path)}
    summary = execute(file, out, factory, retention=None, **changes)
    questions, written, preset = asked(name), rows(out), preset_named(name)
    assert (summary["rows"], summary["errors"]) == (len(questions), 0)
    assert [row["prompt"] for row in written] == [question.prompt for question in questions]
    for place, prompt in PROMPTS[name].items():
        assert written[place]["prompt"] == prompt
    numbers = SENTENCES if name == "refcoco" else [0] * len(questions)
    assert [row["prompt_number"] for row in written] == numbers
    expected_id = KEYS[name] if KEYS[name] is not None else f"{file.name}#0"
    assert written[0]["id"] == expected_id
    assert len({row["id"] for row in written}) == numbers.count(0)
    for row, question in zip(written, questions, strict=True):
        fields = completed(question.fields)
        fields.pop("box_pixels", None)
        fields.pop("mentioned", None)
        assert json.loads(row["fields"]) == fields
        assert (row["metric"], row["error"], row["setting"]) == (preset.metric, None, 0)
    metrics = json.loads((out / "metrics.json").read_text())
    (one,) = metrics["settings"]
    without = [each for each in questions if not _has_truth(str(preset.metric), each.fields)]
    counts = (one["rows"], one["answered"], one["failed"], one["without_truth"])
    assert counts == (len(questions), len(questions), 0, len(without))
    wanted = dict(RIGHT[str(preset.metric)][1])
    wanted.pop("n", None)
    assert {key: one["figures"][key]["value"] for key in wanted} == pytest.approx(wanted)


def test_what_the_samples_are_for(tmp_path: Path) -> None:
    """Boxes as shares of the picture; a question without a picture; answers that lack; objects."""
    boxes = [completed(question.fields)["box"] for question in asked("refcoco")]
    assert boxes[0] == [70 / 96, 20 / 64, 90 / 96, 44 / 64] and len(boxes) == len(SENTENCES)
    out = tmp_path / "out"
    factory = functools.partial(knowing, answers=right_answers("scienceqa"))
    execute(SAMPLES / "scienceqa.parquet", out, factory, preset="scienceqa", mode="generate")
    written = rows(out)
    assert [row["num_images"] for row in written] == [1, 0, 1]
    assert [row["picture"] is None for row in written] == [False, True, False]
    assert [json.loads(row["fields"])["image"] for row in written] == [True, False, True]
    assert [row["response"] for row in written] == ["A", "A", "B"]


@pytest.mark.parametrize(
    ("name", "also"),
    [
        pytest.param("pope", [], marks=pytest.mark.slow),
        pytest.param(
            "gqa", ["--pictures", str(SAMPLES / "gqa_images.parquet")], marks=pytest.mark.slow
        ),
        pytest.param("scienceqa", ["--compare", "1,1/3"], marks=pytest.mark.slow),
    ],
)
def test_a_sample_through_the_demo_model(name: str, also: list[str], tmp_path: Path) -> None:
    """It was not taught these words: it answers all the same."""
    out = tmp_path / "out"
    file = SAMPLES / f"{FILES.get(name, name)}.parquet"
    flags = ["--preset", name, "--input", str(file), "--output", str(out), *also]
    assert main(vqa.JOB, [*flags, "--log-interval", "60"]) == 0
    written, settings = rows(out), 2 if "--compare" in also else 1
    assert len(written) == len(asked(name)) * settings
    assert all(row["error"] is None and row["response"] is not None for row in written)
    metrics = json.loads((out / "metrics.json").read_text())
    assert [one["failed"] for one in metrics["settings"]] == [0] * settings
    for one in metrics["settings"]:
        own = [row["score"] for row in written if row["setting"] == one["setting"]]
        assert one["figures"]["accuracy"]["value"] == pytest.approx(sum(own) / len(own))
