"""A row's prompts, and what is written beside their answers."""

import json
import math
import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from trio.engine.request import Result
from trio.errors import UserError
from trio.job.images.policy import RowError
from trio.job.input.columns import OWN
from trio.job.input.kinds.saved_datasets import WHOLE, Part
from trio.job.output.output_rows import Source
from trio.job.output.totals import as_pairs
from trio.job.questions.asking import Asking, asking_of, likelihoods
from trio.job.questions.question_settings import Questions
from trio.vqa.presets.prompt_template import PromptTemplate

POPE = {"id": "7", "question": "Is there a dog?", "answer": "yes", "category": "random"}
SCIENCE = {
    "question": "Which is a mammal?",
    "hint": "",
    "choices": ["owl", "dog", "ant"],
    "answer": 1,
    "image": None,
}
ERROR = RowError("image_empty", "no image")


def asking(names: list[str] | None = None, part: Part = WHOLE, **settings: Any) -> Asking:
    template = settings.pop("prompt_template", None)
    made = None if template is None else PromptTemplate(template)
    questions = Questions(**{"mode": "generate"} | settings)
    return asking_of(questions, made, names or (), part)


def source(row: Mapping[str, Any], *, picture: str | None = "ab", **changes: Any) -> Source:
    table = pa.table({OWN + name: [None, value] for name, value in row.items()})
    made = Source(key=5, table=table, index=1, path="0.parquet")
    made.picture = picture
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def written(
    how: Asking, row: Mapping[str, Any], response: str | None = None, **changes: Any
) -> dict[str, Any]:
    """What is written about a row's only prompt; without a response, of its error."""
    place = source(row, **changes)
    (ask,) = how.asks(place)
    outcome = ERROR if response is None else Result(id=5, response=response, finish_reason="stop")
    return how.columns_of(ask, place, outcome)


def test_a_preset_makes_prompt_and_fields() -> None:
    how = asking(preset="pope")
    (ask,) = how.asks(source(POPE))
    assert ask.prompt == "Is there a dog?\nAnswer the question using a single word or phrase."
    assert ask.fields == {"answer": "yes", "category": "random"} and not ask.candidates
    assert how.columns == ("answer", "category", "id", "question")
    assert how.roles() == {"id": "id", "image": "image"} and how.key(source(POPE)) is None


@pytest.mark.parametrize(("response", "score"), [("Yes, there is.", 1.0), ("no", 0.0)])
def test_an_answer_is_scored_by_the_presets_metric(response: str, score: float) -> None:
    row = written(asking(preset="pope"), POPE, response)
    assert row == {
        "answers": ["yes"],
        "metric": "pope",
        "fields": '{"answer": "yes", "category": "random"}',
        "groups": [],
        "prediction": response,
        "score": score,
    }


def test_of_an_error_nothing_is_scored() -> None:
    row = written(asking(preset="pope", keep_if="score > 0.5"), POPE)
    assert row.keys() == {"answers", "metric", "fields", "groups", "keep"}
    assert row["keep"] is None
    failed = Result(id=5, finish_reason="error", error="too_long: 9")
    how, place = asking(preset="pope"), source(POPE)
    assert "prediction" not in how.columns_of(how.asks(place)[0], place, failed)


@pytest.mark.parametrize(("metric", "score"), [("pope", 1.0), ("exact_match", 0.0)])
def test_another_metric_than_the_presets(metric: str, score: float, tmp_path: Path) -> None:
    fields = "{answer: answer, category: category, answers: [answer]}"
    (tmp_path / "p.yaml").write_text(f"{{prompt: x, metric: pope, fields: {fields}}}")
    preset = str(tmp_path / "p.yaml")
    row = written(asking(preset=preset, metric=metric), POPE, "Yes, there is.")
    assert (row["metric"], row["score"]) == (metric, score)
    row = written(asking(preset=preset, metric="none"), POPE, "Yes, there is.")
    assert (row["metric"], row["score"]) == (None, None)


def test_a_row_without_a_right_answer_is_asked_and_not_scored() -> None:
    row = written(asking(preset="pope"), POPE | {"answer": None}, "yes")
    assert (row["prediction"], row["score"], row["answers"]) == ("yes", None, None)


def test_what_cannot_be_scored_is_found_out_before_a_model_answers() -> None:
    with pytest.raises(RowError) as raised:
        asking(preset="pope").asks(source(POPE | {"answer": "perhaps"}))
    assert raised.value.kind == "truth_invalid"


def test_what_cannot_be_asked_is_the_rows_own_error() -> None:
    with pytest.raises(RowError) as raised:
        asking(preset="pope").asks(source(POPE | {"question": {"en": "?"}}))
    assert raised.value.kind == "question_invalid"


def test_several_columns_make_an_id() -> None:
    how = asking(preset="mme")
    row = POPE | {"question_id": "a/1.png", "category": "count"}
    assert how.key(source(row)) == "count/a/1.png/Is there a dog?"
    assert how.roles()["id"] == "none"
    with pytest.raises(RowError) as raised:
        how.key(source(row | {"question_id": None}))
    assert raised.value.kind == "id_missing"


def test_a_row_of_many_questions(tmp_path: Path) -> None:
    path = tmp_path / "turns.yaml"
    path.write_text("{prompt: '{turns}', explode: turns}")
    how = asking(preset=str(path))
    found = how.asks(source({"turns": ["What?", "Where?"]}))
    assert [ask.prompt for ask in found] == ["What?", "Where?"]
    for empty in (list[str](), None):
        with pytest.raises(RowError, match="column 'turns' is empty") as raised:
            how.asks(source({"turns": empty}))
        assert raised.value.kind == "question_missing"


def test_groups_are_texts() -> None:
    how = asking(preset="pope", group_by=("category", "year", "gone"))
    (ask,) = how.asks(source(POPE | {"year": 2014}))
    assert ask.groups == {"category": "random", "year": "2014", "gone": ""}
    assert written(how, POPE | {"year": 2014}, "no")["groups"] == as_pairs(ask.groups)


@pytest.mark.parametrize("picture", ["ab", None])
def test_a_row_without_a_picture_may_be_asked(picture: str | None) -> None:
    assert not asking(preset="pope").without_picture
    how = asking(preset="scienceqa")
    assert how.without_picture
    place = source({n: v for n, v in SCIENCE.items() if n != "image"}, picture=picture)
    (ask,) = how.asks(place)
    assert "Context: N/A" in (ask.prompt or "") and "(B) dog" in (ask.prompt or "")


def test_a_template_and_a_split_take_the_place_of_the_presets() -> None:
    part = Part("val_all", "val")
    how = asking(part=part, preset="gqa", prompt_template="{question} Short.")
    assert how.preset.patterns() == ("val_all/val-*.parquet",)
    row = {
        "id": "1",
        "imageId": "n1",
        "question": "Who?",
        "answer": "a man",
        "types": {"structural": "query"},
    }
    assert how.asks(source(row))[0].prompt == "Who? Short."
    assert "image" not in how.roles(), "pictures are joined"
    assert asking(preset="gqa").preset.split == "testdev"


@pytest.mark.parametrize(
    ("names", "settings", "prompt"),
    [
        (["question", "prompt"], {}, "of prompt"),
        (["question"], {}, "of question"),
        (["text"], {"prompt_template": "{text}!"}, "of text!"),
    ],
)
def test_without_a_preset_columns_stand_for_themselves(
    names: list[str], settings: dict[str, Any], prompt: str
) -> None:
    how = asking(names, **settings)
    assert how.roles() == {}
    (ask,) = how.asks(source({name: f"of {name}" for name in names}))
    assert (ask.prompt, ask.fields) == (prompt, {})


def test_a_metric_without_a_preset_reads_its_fields() -> None:
    names = ["question", "answers", "category", "other"]
    how = asking(names, metric="vqav2")
    assert how.columns == ("answers", "category", "question")
    row = written(how, {"question": "?", "answers": ["a dog"] * 10, "category": "c"}, "a dog")
    assert row["score"] == pytest.approx(1.0) and row["answers"] == ["a dog"] * 10
    assert json.loads(row["fields"])["category"] == "c"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "no column prompt or question; it has image"),
        ({"metric": "vqav2", "prompt_template": "x"}, "--metric vqav2 needs a column 'answers'"),
        ({"mode": "likelihood", "prompt_template": "x"}, "--mode likelihood needs a column 'choi"),
        (
            {"mode": "likelihood", "metric": "vqav2", "prompt_template": "x"},
            "--metric vqav2 needs a column 'answers'",
        ),
    ],
)
def test_columns_that_are_missing(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        asking(["image"], **settings)


def test_every_shard_has_the_columns() -> None:
    how = asking(preset="pope", group_by=("year",))
    whole = pa.schema([(name, pa.string()) for name in (*POPE, "image", "year")])
    how.check([whole, whole], ["0", "1"])
    for lacking, says in [("answer", "needs 'answer'"), ("year", "1: no column 'year'")]:
        less = whole.remove(whole.get_field_index(lacking))
        with pytest.raises(UserError, match=says):
            how.check([whole, less], ["0", "1"])


def scored(*logprobs: list[float]) -> Result:
    return Result(id=5, candidate_logprobs=list(logprobs), finish_reason="scored")


def by_likelihood(
    row: Mapping[str, Any], *logprobs: list[float], preset: str = "scienceqa", **settings: Any
) -> dict[str, Any]:
    how, place = asking(preset=preset, mode="likelihood", **settings), source(row)
    (ask,) = how.asks(place)
    return how.columns_of(ask, place, scored(*logprobs))


ROW = {name: value for name, value in SCIENCE.items() if name != "image"}


def test_of_a_rows_own_choices_the_likeliest_is_the_answer() -> None:
    row = by_likelihood(ROW, [-2.0, -1.0], [-0.5, -0.5], [-4.0])
    assert row["choices"] == ["owl", "dog", "ant"]
    assert (row["prediction"], row["score"]) == ("dog", 1.0)
    assert (row["choice_logprobs"], row["choice_tokens"]) == ([-3.0, -1.0, -4.0], [2, 2, 1])
    assert by_likelihood(ROW, [-0.1], [-1.0], [-2.0])["score"] == 0.0


def test_candidates_for_all_rows_take_the_place_of_choices() -> None:
    row = by_likelihood(POPE, [-1.0], [-2.0], preset="pope", candidates=("Yes", "No"))
    assert (row["choices"], row["prediction"], row["score"]) == (["Yes", "No"], "Yes", 1.0)
    row = by_likelihood(POPE, [-3.0], [-2.0], preset="pope", candidates=("Yes", "No"))
    assert (row["prediction"], row["score"]) == ("No", 0.0)


@pytest.mark.parametrize("choices", [None, [], ["owl"]])
def test_a_row_with_one_choice_cannot_be_asked(choices: list[str] | None) -> None:
    how = asking(["question", "choices"], mode="likelihood")
    with pytest.raises(RowError, match="choices; two are needed") as raised:
        how.asks(source({"question": "?", "choices": choices}))
    assert raised.value.kind == "choices_missing"


def test_choices_stay_where_a_row_fails() -> None:
    row = written(asking(preset="scienceqa", mode="likelihood"), ROW)
    assert row["choices"] == ["owl", "dog", "ant"] and "p_choice" not in row


@pytest.mark.parametrize(
    ("condition", "keep"),
    [
        ("p_first > 0.3", True),
        ("p_first > 0.4", False),
        ("p_best > 0.7 and margin > 1", True),
        ("margin > 1.2", False),
        ("score < 1 and p_best > 0.5", True),
    ],
)
def test_a_condition_reads_likelihoods(condition: str, keep: bool) -> None:
    row = by_likelihood(
        POPE | {"answer": "no"}, [-1.0], [-2.1], preset="pope", candidates=("Yes", "No"),
        keep_if=condition,
    )  # fmt: skip
    assert row["keep"] is keep


@pytest.mark.parametrize(("logprobs", "keep"), [([-0.5, -0.1], True), ([-3.0], False), ([], None)])
def test_a_condition_reads_answers(logprobs: list[float], keep: bool | None) -> None:
    how, place = asking(preset="pope", keep_if="logprob_mean > -1"), source(POPE)
    (ask,) = how.asks(place)
    result = Result(id=5, response="yes", logprobs=logprobs, finish_reason="stop")
    assert how.columns_of(ask, place, result)["keep"] is keep


@pytest.mark.parametrize(
    ("by_tokens", "prediction", "margin"), [(False, "Yes", 1.0), (True, "No, not", 1.0)]
)
def test_likelihoods_are_sums_or_means(by_tokens: bool, prediction: str, margin: float) -> None:
    logprobs = [[-2.0], [-1.0, -1.0, -1.0]]
    found = likelihoods(["Yes", "No, not"], logprobs, by_tokens=by_tokens)
    assert (found["prediction"], found["margin"]) == (prediction, pytest.approx(margin))
    assert found["choice_logprobs"] == [-2.0, -3.0], "sums in any case"
    assert found["p_first"] == pytest.approx(math.exp(-2.0))
    assert sum(found["p_choice"]) == pytest.approx(1.0)
    odds = found["p_choice"][0] / found["p_choice"][1]
    assert odds == pytest.approx(math.exp(-1.0 if by_tokens else 1.0))


def test_likelihoods_of_very_unlikely_answers() -> None:
    found = likelihoods(["a", "b"], [[-800.0, -900.0], [-1800.0]], by_tokens=False)
    assert found["p_choice"] == [1.0, pytest.approx(math.exp(-100))] and found["p_first"] == 0.0


def test_of_equal_likelihoods_the_first_is_the_answer() -> None:
    found = likelihoods(["a", "b"], [[-1.0], [-1.0]], by_tokens=False)
    assert (found["prediction"], found["margin"], found["p_choice"]) == ("a", 0.0, [0.5, 0.5])


def test_a_box_is_told_in_shares_of_its_picture() -> None:
    how = asking(preset="refcoco")
    phrases = ["the dog", "a puppy"]
    row = {"question_id": 1, "answer": phrases, "bbox": [20.0, 10.0, 40.0, 30.0]}
    place = source(row, size=(200, 100))
    for number, ask in enumerate(how.asks(place)):
        assert str(ask.prompt).endswith(f"Phrase: {phrases[number]}")
        right = Result(id=5, response="[0.1, 0.1, 0.3, 0.4]", finish_reason="stop")
        told = how.columns_of(ask, place, right)
        assert json.loads(told["fields"]) == {"box": [0.1, 0.1, 0.3, 0.4]}
        assert told["score"] == 1.0
        wrong = replace(right, response="[0.5, 0.5, 0.7, 0.7]")
        assert how.columns_of(ask, place, wrong)["score"] == 0.0


def test_settings_travel() -> None:
    how = asking(preset="gqa", group_by=("a",))
    assert pickle.loads(pickle.dumps(how)) == how
    assert replace(how, questions=Questions()) != how
