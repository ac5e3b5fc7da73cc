"""Which files of a data set are read, and what tells that they changed."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.job.fakes import write_shard
from trio.errors import UserError
from trio.job.input.manifest import expand
from trio.job.questions.dataset_files import digests, picture_files, question_paths
from trio.job.questions.question_settings import Questions
from trio.vqa.presets.preset import PictureJoin, Preset
from trio.vqa.presets.prompt_template import PromptTemplate

PLAIN = Preset(name="mine", prompt=PromptTemplate("{question}"))
ENGLISH = replace(PLAIN, config="en", split="dev")
JOINED = replace(ENGLISH, images=PictureJoin(config="pictures", key="id", by="photo"))
QUESTION = pa.schema([("question", pa.string()), ("photo", pa.string())])
PICTURE = pa.schema([("id", pa.string()), ("image", pa.binary())])


def shards(root: Path, *names: str) -> Path:
    for name in names:
        write_shard(root / name, [{"question": "?", "photo": "a"}], QUESTION)
    return root


def pictures(root: Path, *names: str) -> None:
    for name in names:
        write_shard(root / name, [{"id": name, "image": b"x"}], PICTURE)


def read(preset: Preset, root: Path, given: str = "") -> tuple[list[str], list[str]]:
    """Names of the shards that are read of a directory, and what is said."""
    lines: list[str] = []
    paths = question_paths(preset, [f"{root}/{given}" if given else str(root)], lines.append)
    found = expand(paths, None, lines.append)
    return [str(Path(one.location.path).relative_to(root)) for one in found], lines


LAYOUTS = [
    (PLAIN, ["data/test-00000.parquet", "data/test-00001.parquet"], ["data/train-00000.parquet"]),
    (PLAIN, ["test-00000-of-00001.parquet"], ["train-00000-of-00001.parquet"]),
    (PLAIN, ["data/test-0.parquet"], ["test-0.parquet"]),
    (ENGLISH, ["en/dev-0.parquet", "en/dev-1.parquet"], ["en/test-0.parquet", "de/dev-0.parquet"]),
    (replace(PLAIN, split="val"), ["data/val-0.parquet"], ["data/test-0.parquet"]),
    (replace(PLAIN, files=("old/*.parquet",)), ["old/a.parquet"], ["new/b.parquet"]),
    (replace(PLAIN, files=("old/*.parquet",)), ["data/test-0.parquet"], ["old/a.parquet"]),
]


@pytest.mark.parametrize(("preset", "wanted", "others"), LAYOUTS)
@pytest.mark.parametrize("end", ["", "/"])
def test_a_directory_of_the_same_layout(
    tmp_path: Path, preset: Preset, wanted: list[str], others: list[str], end: str
) -> None:
    shards(tmp_path, *wanted, *others)
    lines: list[str] = []
    (path,) = question_paths(preset, [f"{tmp_path}{end}"], lines.append)
    found = [Path(one.location.path) for one in expand([path], None)]
    assert found == [tmp_path / name for name in wanted] and lines == []


@pytest.mark.parametrize("preset", [PLAIN, ENGLISH])
def test_another_layout_is_read_whole_and_said(tmp_path: Path, preset: Preset) -> None:
    shards(tmp_path, "a.parquet", "b/c.parquet")
    found, (line,) = read(preset, tmp_path)
    assert found == ["a.parquet", "b/c.parquet"]
    pattern = preset.patterns()[0]
    assert line == (
        f"--input {tmp_path}: nothing there is called {pattern}: all Parquet files are read"
    )


@pytest.mark.parametrize("given", ["b/c.parquet", "b/*.parquet", "b/[c].parquet"])
def test_a_file_or_a_pattern_is_taken_at_its_word(tmp_path: Path, given: str) -> None:
    shards(tmp_path, "data/test-0.parquet", "b/c.parquet")
    assert read(PLAIN, tmp_path, given) == (["b/c.parquet"], [])


def test_each_input_has_a_layout_of_its_own(tmp_path: Path) -> None:
    one = shards(tmp_path / "one", "data/test-0.parquet", "data/train-0.parquet")
    two = shards(tmp_path / "two", "test-0.parquet", "train-0.parquet")
    paths = question_paths(PLAIN, [str(one), str(two)], pytest.fail)
    assert paths == (f"{one}/data/test-*.parquet", f"{two}/test-*.parquet")


def test_a_directory_that_is_not_there_is_left_to_the_manifest(tmp_path: Path) -> None:
    lines: list[str] = []
    with pytest.raises(UserError, match="nowhere"):
        expand(question_paths(PLAIN, [str(tmp_path / "nowhere")], lines.append), None)


def test_a_preset_without_a_repository_needs_an_input() -> None:
    with pytest.raises(UserError, match="preset 'mine' names no repository: give --input"):
        question_paths(PLAIN, [], pytest.fail)


def test_repositories_that_cannot_be_had_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    preset = replace(ENGLISH, repositories=("org/new", "org/old"))
    with pytest.raises(UserError) as raised:
        question_paths(preset, [], pytest.fail)
    said = str(raised.value)
    assert "en/dev-*.parquet of neither org/new nor org/old" in said and "\n" not in said


def joined(root: Path, *given: str, paths: list[str] | None = None) -> list[str] | None:
    """Names of the files of pictures."""
    paths = paths or list(question_paths(JOINED, [str(root)], pytest.fail))
    found = picture_files(JOINED, Questions(preset="gqa", pictures=given), paths, pytest.fail)
    if found is None:
        return None
    assert (found.key, found.image, found.by) == ("id", "image", ".photo")
    assert list(found.sizes) == [Path(path).stat().st_size for path in found.paths]
    return [str(Path(path).relative_to(root)) for path in found.paths]


def test_pictures_lie_beside_the_questions(tmp_path: Path) -> None:
    shards(tmp_path, "en/dev-0.parquet")
    pictures(
        tmp_path, "pictures/dev-0.parquet", "pictures/dev-1.parquet", "pictures/test-0.parquet"
    )
    assert joined(tmp_path) == ["pictures/dev-0.parquet", "pictures/dev-1.parquet"]
    one = [str(tmp_path / "en" / "dev-0.parquet")]
    assert joined(tmp_path, paths=one) == ["pictures/dev-0.parquet", "pictures/dev-1.parquet"]


def test_pictures_that_are_given_take_the_place_of_those(tmp_path: Path) -> None:
    shards(tmp_path, "en/dev-0.parquet")
    pictures(tmp_path, "pictures/dev-0.parquet", "mine/a.parquet", "mine/b.parquet")
    assert joined(tmp_path, str(tmp_path / "mine")) == ["mine/a.parquet", "mine/b.parquet"]
    assert joined(tmp_path, str(tmp_path / "mine" / "b.parquet")) == ["mine/b.parquet"]


def test_pictures_that_are_missing_are_asked_for(tmp_path: Path) -> None:
    shards(tmp_path, "en/dev-0.parquet")
    with pytest.raises(UserError, match=r"\(pictures/dev-\*\.parquet\): give them with --pictures"):
        joined(tmp_path)


def test_a_picture_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    shards(tmp_path, "en/dev-0.parquet")
    for name in ("pictures/dev-0.parquet", "pictures/dev-1.parquet"):
        write_shard(tmp_path / name, [{"id": "a", "image": b"x"}], PICTURE)
    with pytest.raises(UserError, match="id 'a' names two pictures"):
        joined(tmp_path)


def test_a_preset_that_joins_nothing(tmp_path: Path) -> None:
    shards(tmp_path, "data/test-0.parquet")
    assert picture_files(PLAIN, Questions(), [str(tmp_path)], pytest.fail) is None
    with pytest.raises(UserError, match="--pictures: no preset here joins pictures"):
        picture_files(
            PLAIN, Questions(preset="pope", pictures=("p",)), [str(tmp_path)], pytest.fail
        )


def test_digests_follow_the_files(tmp_path: Path) -> None:
    preset, words = tmp_path / "mine.yaml", tmp_path / "objects.txt"
    preset.write_text("{prompt: x, metric: chair, fields: {present: p}}")
    words.write_text("dog, puppy\n")
    questions = Questions(preset=str(preset), objects=str(words))
    shards(tmp_path, "en/dev-0.parquet")
    pictures(tmp_path, "pictures/dev-0.parquet")

    def now() -> dict[str, str]:
        paths = [str(tmp_path / "en" / "dev-0.parquet")]
        return digests(questions, picture_files(JOINED, Questions(), paths, pytest.fail))

    seen = [now()]
    changes: list[Any] = [
        lambda: preset.write_text("{prompt: y, metric: chair, fields: {present: p}}"),
        lambda: words.write_text("cat, kitten\n"),
        lambda: pictures(tmp_path, "pictures/dev-1.parquet"),
    ]
    for change in changes:
        assert now() == seen[-1]
        change()
        seen.append(now())
    names = list(seen[0])
    assert len(names) == 3
    for number, (before, after) in enumerate(pairwise(seen)):
        assert [before[name] != after[name] for name in names] == [n == number for n in range(3)]


def test_nothing_of_ones_own_has_no_digest() -> None:
    assert digests(Questions(preset="pope"), None) == {} == digests(Questions(), None)
