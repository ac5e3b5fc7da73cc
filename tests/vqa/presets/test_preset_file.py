"""A user's own presets, and what is wrong with them in one line."""

from pathlib import Path

import pytest

from trio.errors import UserError
from trio.vqa.presets.preset_file import known_presets, preset_named, read_preset
from trio.vqa.presets.prompt_template import PromptTemplate

README = Path(__file__).parents[3] / "trio" / "vqa" / "presets" / "README.md"

REFUSED = {
    "promt: x": "unknown key 'promt' (did you mean 'prompt'?); known: name, repositories,",
    "name: birds": "no key 'prompt', which is needed",
    "": "expected keys with values, as in 'prompt: ...'; got None",
    "- prompt": "expected keys with values, as in 'prompt: ...'; got ['prompt']",
    "prompt: [": "not YAML: while parsing",
    "prompt: 3": "prompt: expected text, got 3",
    "prompt: '{question:upper}'": "prompt: unknown spec 'upper' of 'question'; known: options,",
    "prompt: '{question'": "prompt: '{question': expected '}' before end of string; a brace",
    "{prompt: x, id: {a: b}}": "id: expected text, got {'a': 'b'}",
    "{prompt: x, split: yes}": "split: expected text, got True",
    "{prompt: x, metric: popes}": "metric: no metric 'popes' (did you mean 'pope'?); textvqa,",
    "{prompt: x, metric: pope, fields: {answer: a}}": "metric 'pope' needs 'category'; say under",
    "{prompt: x, metric: refcoco}": "metric 'refcoco' needs 'box_pixels'; say under fields",
    "{prompt: x, metric: chair}": "metric 'chair' needs 'present'; say under fields",
    "{prompt: x, fields: answer}": "fields: expected names with columns, as in",
    "{prompt: x, fields: {answer: 3}}": "fields: answer: expected column, column[], column[].fie",
    "{prompt: x, fields: {answer: {absent: a}}}": "fields: answer: expected column, column[], ",
    "{prompt: x, fields: {answer: []}}": "fields: answer: expected column, column[], column[]",
    "{prompt: x, fields: {answer: 'a[].b[].c'}}": "fields: answer: 'b[].c' is no column, nor a",
    "{prompt: x, fields: {answer: 'a[]b'}}": "fields: answer: 'a[]b': behind [] comes nothing",
    "{prompt: x, fields: {answer: 'a..b'}}": "fields: answer: 'a..b' is no column, nor a field",
    "{prompt: x, images: photos}": "images: expected keys with values",
    "{prompt: x, images: {config: p, key: id}}": "images: no key 'by', which is needed",
    "{prompt: x, images: {config: p, key: id, bye: id}}": "images: unknown key 'bye' (did you mea",
}


def written(folder: Path, text: str) -> Path:
    path = folder / "birds.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("text", REFUSED)
def test_refused(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(UserError) as raised:
        read_preset(path)
    assert str(raised.value).startswith(f"{path}: {REFUSED[text]}")
    assert "\n" not in str(raised.value)


def test_only_a_prompt_is_needed(tmp_path: Path) -> None:
    preset = preset_named(str(written(tmp_path, "prompt: Describe the bird.")))
    assert (preset.name, preset.prompt) == ("birds", PromptTemplate("Describe the bird."))
    assert (preset.metric, preset.columns, preset.key({})) == (None, frozenset(), None)
    (question,) = preset.questions({"image": True})
    assert (question.prompt, question.fields) == ("Describe the bird.", {})


def test_the_example_of_the_readme(tmp_path: Path) -> None:
    example = README.read_text(encoding="utf-8").split("```yaml\n")[1].split("```")[0]
    preset = read_preset(written(tmp_path, example))
    row = {
        "bird_id": 7, "question": "Which bird?", "first": "owl", "second": None, "third": "rook",
        "solution": {"place": 1},
    }  # fmt: skip
    assert preset.columns == {*row, "note"}
    assert preset.key(row) == 7
    (question,) = preset.questions(row)
    assert question.prompt == ("Context: none\nWhich bird?\nA. owl\nB. rook\nAnswer with a letter.")
    assert question.fields == {"choices": ["owl", "rook"], "answer": 1}


def test_a_lone_value_is_a_list_of_itself(tmp_path: Path) -> None:
    preset = read_preset(written(tmp_path, "{prompt: x, id: a, splits: [b, c], missing: nan}"))
    assert (preset.id, preset.splits, preset.missing) == (("a",), ("b", "c"), ("nan",))


def test_an_image_column_that_a_join_goes_by_is_read(tmp_path: Path) -> None:
    text = "{prompt: x, images: {config: photos, key: name, by: image, image: photo}}"
    preset = read_preset(written(tmp_path, text))
    assert preset.columns == {"image"}
    assert preset.picture_patterns() == ("photos/test-*.parquet",)


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(UserError, match=r"^preset 'absent\.yml' cannot be read: .*No such file"):
        preset_named("absent.yml")


def test_an_unknown_name() -> None:
    with pytest.raises(
        UserError, match=r"^unknown preset 'popes' \(did you mean 'pope'\?\); known"
    ):
        preset_named("popes")
    assert preset_named("pope") is known_presets()["pope"]
