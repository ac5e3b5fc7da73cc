"""Flags of structured answers: which go together, and what is said before Ray starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import caption
import jsonschema
import pytest
import vqa

from tests.job.runs import rows
from tests.tiny.byte_level import save_spelling_llava
from tests.tiny.llava import save_tiny_checkpoint
from trio.bundled import SHARD
from trio.engine.request import Constraint
from trio.errors import UserError
from trio.job.command import main
from trio.job.plan import plan
from trio.job.questions.constraint_check import check_constraint, constrained, schema_digest
from trio.job.settings import Settings, made_of

SCHEMA = {"type": "object", "properties": {"a": {"enum": ["red", "blue"]}}, "required": ["a"]}


def tidying(directory: Path) -> Path:
    """A model whose decoding takes spaces out, as its tokenizer's configuration has it."""
    file = directory / "tokenizer_config.json"
    tidy = "clean_up_tokenization_spaces"
    given = {tidy: True, f"{tidy}_for_bpe_even_though_it_will_corrupt_output": True}
    file.write_text(json.dumps(json.loads(file.read_text()) | given))
    return directory


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Directories of a model whose tokens are words, and of one whose tokens spell."""
    make = tmp_path_factory.mktemp
    return {
        "words": str(save_tiny_checkpoint(make("words"), layers=1)),
        "letters": str(save_spelling_llava(make("letters"))),
        "tidy": str(tidying(save_spelling_llava(make("tidy")))),
        "hub": "nobody/nothing",
    }


@pytest.fixture
def schema(tmp_path: Path) -> Path:
    path = tmp_path / "scene.json"
    path.write_text(json.dumps(SCHEMA))
    return path


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"regex": "a", "choices": "yes,no"}, "--regex and --choices exclude each other"),
        ({"regex": "a", "json_schema": "s"}, "--json-schema and --regex exclude each other"),
        ({"mode": "likelihood", "choices": ("a", "b")}, r"its answers are --candidates"),
    ],
)
def test_what_does_not_go_together(given: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        made_of(**given)


def test_a_constraint_reaches_the_sampling_with_the_files_content(schema: Path) -> None:
    assert constrained(Settings()) == Settings()
    of_flags: dict[str, tuple[dict[str, Any], Constraint]] = {
        "choices": ({"choices": ("yes", "not sure")}, Constraint(choices=("yes", "not sure"))),
        "regex": ({"regex": "[0-9]+"}, Constraint(regex="[0-9]+")),
        "file": ({"json_schema": str(schema)}, Constraint(json_schema=schema.read_text())),
    }
    for flags, constraint in of_flags.values():
        config = constrained(made_of(**flags, max_new_tokens=9))
        assert config.sampling.constraint == constraint
        assert config.sampling.max_new_tokens == 9
        assert config.replace(limit=3).sampling.constraint == constraint
        assert constrained(config) == config


def test_another_schema_is_another_run(schema: Path) -> None:
    config = made_of(json_schema=str(schema))
    before = schema_digest(constrained(config))
    assert list(before) == [f"{schema} (of --json-schema)"]
    schema.write_text(json.dumps(SCHEMA | {"title": "another"}))
    assert schema_digest(constrained(config)).values() != before.values()
    assert schema_digest(constrained(made_of(regex="a"))) == {}


@pytest.mark.parametrize(
    ("model", "given", "says"),
    [
        ("words", {"choices": ("red", "yes please")}, None),
        ("words", {"choices": ("red", "purple")}, "--choices: the model's tokens write '' for 'pu"),
        ("words", {"choices": ("red", "<image>")}, None),
        ("tidy", {"regex": "red"}, "tokens spell the text; this model's do not"),
        ("words", {"regex": "red"}, "tokens spell the text; this model's do not"),
        ("words", {"regex": "red("}, r"regex 'red\('"),
        ("letters", {"regex": "red"}, None),
        ("letters", {"choices": ("red", "sm\u00f8rrebr\u00f8d")}, None),
        ("letters", {"json_schema": SCHEMA}, None),
        ("letters", {"json_schema": SCHEMA | {"not": {}}}, r"at \$: 'not' is not followed"),
        ("hub", {"choices": ("red", "purple")}, None),
        ("hub", {"regex": "a++b("}, "regex"),
        ("hub", {"regex": "red"}, None),
    ],
)
def test_what_engines_would_refuse_is_said_before(
    models: dict[str, str], tmp_path: Path, model: str, given: dict[str, Any], says: str | None
) -> None:
    if "json_schema" in given:
        (tmp_path / "s.json").write_text(json.dumps(given["json_schema"]))
        given = {"json_schema": str(tmp_path / "s.json")}
    config = constrained(made_of(model=models[model], **given))
    if says is None:
        check_constraint(config)
        return
    with pytest.raises(UserError, match=says) as raised:
        check_constraint(config)
    assert "\n" not in str(raised.value)


def test_a_plan_brings_the_content_and_refuses_what_cannot_be(
    models: dict[str, str], tmp_path: Path, schema: Path
) -> None:
    flags: dict[str, Any] = {"output": str(tmp_path / "out"), "model": models["letters"]}
    config = made_of(**flags, json_schema=str(schema))
    made = plan(config, [str(SHARD)])
    assert made.config.sampling.constraint == Constraint(json_schema=schema.read_text())
    assert f"{schema} (of --json-schema)" in made.fingerprint.model_files
    assert made.fingerprint.settings["json_schema"] == str(schema)
    with pytest.raises(UserError, match="spell the text"):
        plan(config.replace(model=models["words"]), [str(SHARD)])
    with pytest.raises(UserError, match=r"--json-schema .*/no\.json: cannot be read"):
        plan(config.replace(json_schema=str(tmp_path / "no.json")), [])


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_a_job_whose_answers_are_json(
    models: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    word = {"type": "string", "maxLength": 12}
    wanted = SCHEMA | {"properties": {**SCHEMA["properties"], "word": word}}  # type: ignore[dict-item]
    file = tmp_path / "scene.json"
    file.write_text(json.dumps(wanted | {"required": ["a", "word"]}))
    output = tmp_path / "out"
    flags = ["--model", models["letters"], "--limit", "24", "--json-schema", str(file)]
    flags += ["--output", str(output), "--max-new-tokens", "34", "--max-error-rate", "1"]
    flags += ["--method", "none", "--temperature", "1"]
    assert main(caption.JOB, flags) == 0
    made = rows(output)
    whole = [row for row in made if row["error"] is None]
    for row in whole:
        jsonschema.validate(json.loads(row["response"]), json.loads(file.read_text()))
    cut = [row for row in made if (row["error"] or "").startswith("incomplete: 34 tokens")]
    assert len(whole) + len(cut) == len(made) and whole and cut
    assert all(row["response"] is None and '{"a":"' in row["error"] for row in cut)
    summary = json.loads((output / "summary.json").read_text())
    assert summary["error_kinds"] == {"incomplete": len(cut)}
    (output / "_SUCCESS").unlink()
    file.write_text(json.dumps(SCHEMA))
    assert main(caption.JOB, flags) == 2
    assert "scene.json (of --json-schema) has changed" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_a_job_whose_answers_are_choices(tmp_path: Path) -> None:
    choices = ("yes", "no", "a red 5", "a red 5 and a green 7")
    flags = ["--limit", "40", "--choices", ",".join(choices), "--output", str(tmp_path / "out")]
    assert main(vqa.JOB, [*flags, "--retention", "1/9"]) == 0
    made = rows(tmp_path / "out")
    assert {row["response"] for row in made} <= set(choices) and len(made) == 40
    assert {row["finish_reason"] for row in made} == {"stop"}
    assert len({row["response"] for row in made}) > 1
