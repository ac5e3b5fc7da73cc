"""What is said of prompts before a run."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.job.fakes import write_shard
from tests.tiny.llava import save_tiny_checkpoint
from trio.job.input.columns import OWN as NAME
from trio.job.input.columns import Columns
from trio.job.input.manifest import inspect
from trio.job.questions.asking import asking_of
from trio.job.questions.prompt_notices import prompt_notices
from trio.job.settings import made_of
from trio.job.storage import locate

OTHER = pa.schema([("image", pa.binary())])
OWN = "rows keep their own prompt"
BROKEN = "caf\udce9"
"""Stands for text that is not UTF-8."""


@pytest.mark.parametrize(
    ("flags", "prompts", "says"),
    [
        ({}, ["Describe the image.", None, "where is the 3 ?"], []),
        ({}, ["What is this?", "Who?", "Who?"], ["'What is this?' and 1 more: do not"]),
        ({}, [BROKEN, "What is this?"], ["'What is this?': do not"]),
        ({"limit": 1}, ["Describe the image.", "Who?"], []),
        ({"prompt": ("Who?",)}, None, ["'Who?': do not"]),
        ({"prompt": ("Describe this photo in one sentence.",)}, None, []),
        ({"prompt": ("Is there a 7?",)}, ["where is the 3 ?"], [OWN]),
        ({"model": "org/name", "prompt": ("Who?",)}, None, []),
        ({"model": "org/name", "prompt": ("Who?",)}, ["What?"], [OWN]),
    ],
)
def test_prompts_that_are_not_what_they_seem_are_told(
    tmp_path: Path, flags: dict[str, object], prompts: list[str | None] | None, says: list[str]
) -> None:
    if prompts is None:
        write_shard(tmp_path / "0.parquet", [{"image": b""}], OTHER)
    else:
        texts = [text and text.encode("utf-8", "surrogateescape") for text in prompts]
        column = pa.array(texts, pa.binary()).view(pa.string())
        pq.write_table(
            pa.table({"image": [b""] * len(texts), "prompt": column}), tmp_path / "0.parquet"
        )
    write_shard(tmp_path / "1.parquet", [{"image": b""}], OTHER)
    manifest, _ = inspect([str(tmp_path)], locate(str(tmp_path / "out")))
    config = made_of(**flags)
    columns = Columns(roles={} if prompts is None else {"prompt": "prompt"}, id_type=pa.string())
    lines = list(prompt_notices(config, manifest, columns))
    assert len(lines) == len(says), lines
    assert all(text in line for text, line in zip(says, lines, strict=True))


@pytest.mark.parametrize(
    ("prompt", "says"),
    [("what is in the picture ?", []), ("what color is a zyxt qwop ?", ["4 of 7 tokens"])],
)
def test_words_that_a_model_does_not_know_are_told(
    tmp_path: Path, prompt: str, says: list[str]
) -> None:
    model = str(save_tiny_checkpoint(tmp_path / "model"))
    schema = pa.schema([("image", pa.binary()), ("question", pa.string())])
    write_shard(tmp_path / "in" / "0.parquet", [{"image": b"", "question": prompt}], schema)
    manifest, _ = inspect([str(tmp_path / "in")], locate(str(tmp_path / "out")))
    config = made_of(model=model, mode="generate")
    columns = Columns(roles={NAME + "question": "question"}, id_type=pa.string())
    asking = asking_of(config.questions, names=["question"])
    lines = list(prompt_notices(config, manifest, columns, asking))
    assert len(lines) == len(says), lines
    assert all(text in line for text, line in zip(says, lines, strict=True))


def test_a_presets_notice_is_told(tmp_path: Path) -> None:
    manifest, _ = inspect(["tests/vqa/samples/vqav2.parquet"], locate(str(tmp_path / "out")))
    config = made_of(mode="generate", preset="vqav2", model="org/name")
    asking = asking_of(config.questions)
    roles = {NAME + name: name for name in asking.columns}
    lines = list(
        prompt_notices(config, manifest, Columns(roles=roles, id_type=pa.string()), asking)
    )
    assert lines == ["preset vqav2: the test split has no answers, so no score"]
