"""Settings of questions: what each may be, and which go together."""

from pathlib import Path
from typing import Any

import pytest

from trio.errors import UserError
from trio.job.questions.question_settings import Questions
from trio.job.settings import FIELDS, made_of
from trio.vqa.aggregates import METRICS

OWN = "{prompt: '{question}', metric: pope, fields: {answer: a, category: c}}"


@pytest.fixture
def preset(tmp_path: Path) -> str:
    path = tmp_path / "birds.yaml"
    path.write_text(OWN)
    return str(path)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("mode", "guess", "generate"),
        ("preset", "popes", "did you mean 'pope'"),
        ("preset", "nowhere.yaml", "cannot be read"),
        ("prompt_template", "{question", "expected '}'"),
        ("prompt_template", "{question:upper}", "unknown spec 'upper'"),
        ("metric", "rouge", "exact_match"),
        ("candidates", "Yes", "two or more different answers"),
        ("candidates", "Yes,Yes", "two or more different answers"),
        ("candidates", ["Yes"], "two or more different answers"),
        ("normalise", "letters", "sum"),
        ("keep_if", "p_fist > 1", "no figure 'p_fist'"),
        ("pictures", ["s3://key:secret@bucket/a"], "secret|password|credential|key"),
    ],
)
def test_values_that_are_none(name: str, value: Any, says: str) -> None:
    with pytest.raises(UserError, match=says) as raised:
        FIELDS[name].value.read(value)
    assert "secret@" not in str(raised.value)


@pytest.mark.parametrize("value", ["Yes,No", ["Yes", "No"], ("Yes", "No")])
def test_candidates_are_text_or_a_list(value: Any) -> None:
    assert FIELDS["candidates"].value.read(value) == ("Yes", "No")


@pytest.mark.parametrize("metric", [*METRICS, "none"])
def test_every_metric_can_be_named(metric: str) -> None:
    assert FIELDS["metric"].value.read(metric) == metric


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"candidates": ("Yes", "No")}, "--candidates is for --mode likelihood"),
        ({"mode": "generate", "with_eos": True}, "--with-eos is for --mode likelihood"),
        ({"mode": "generate", "normalise": "tokens"}, "--normalise is for --mode likelihood"),
        ({"pictures": ("p",)}, "--pictures needs --preset"),
        ({"keep_if": "p_first > 0.5"}, "no p_first with --mode generate"),
        ({"mode": "likelihood", "keep_if": "logprob_mean > -1"}, "no logprob_mean with --mode li"),
        ({"objects": "o.txt"}, "--objects is for metric chair"),
        ({"objects": "o.txt", "metric": "pope"}, "--objects is for metric chair"),
        ({"objects": "o.txt", "preset": "chair", "metric": "none"}, "--objects is for metric cha"),
        ({"preset": "chair"}, "metric chair needs --objects FILE"),
        ({"metric": "chair"}, "metric chair needs --objects FILE"),
    ],
)
def test_what_does_not_go_together(given: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Questions(**given)


@pytest.mark.parametrize(
    "given",
    [
        {"mode": "likelihood", "candidates": ("A", "B"), "with_eos": True, "normalise": "tokens"},
        {"mode": "likelihood", "keep_if": "p_first > 0.5 and score > 0"},
        {"preset": "gqa"},
        {"preset": "chair", "objects": "o.txt"},
        {"metric": "chair", "objects": "o.txt"},
        {"keep_if": "logprob_mean > -1"},
    ],
)
def test_what_goes_together(given: dict[str, Any]) -> None:
    assert made_of(**given).questions == Questions(**given)


@pytest.mark.parametrize(
    ("given", "metric"),
    [
        ({}, None),
        ({"preset": "pope"}, "pope"),
        ({"preset": "pope", "metric": "exact_match"}, "exact_match"),
        ({"preset": "pope", "metric": "none"}, None),
        ({"metric": "vqav2"}, "vqav2"),
        ({"metric": "none"}, None),
    ],
)
def test_the_metric_is_the_presets_unless_another_is_named(
    given: dict[str, Any], metric: str | None
) -> None:
    assert Questions(**given).scored_by == metric


def test_a_preset_of_the_users_own(preset: str) -> None:
    assert FIELDS["preset"].value.read(preset) == preset
    assert Questions(preset=preset).scored_by == "pope"


def test_captions_are_scored_by_their_own_rule() -> None:
    assert made_of(score="objects").scored_by == "objects"
    assert made_of(score="objects", mode="generate", metric="none").scored_by is None
    assert made_of(score="none", mode="generate", metric="vqav2").scored_by == "vqav2"
