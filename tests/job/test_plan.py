"""Plans over inputs of other kinds than Parquet, for both jobs."""

from pathlib import Path

import pytest

from tests.job.input.kinds.input_samples import (
    rows_with_paths,
    write_images,
    write_img2dataset,
    write_jsonl,
)
from trio.errors import UserError
from trio.job.plan import Plan, plan
from trio.job.questions.prompt_notices import prompt_notices
from trio.job.settings import made_of


def planned(folder: Path, given: Path, **settings: object) -> Plan:
    output = str(folder / "out")
    config = made_of(input=(str(given),), output=output, retention=0.25, **settings)
    return plan(config, config.input.input, say=lambda _: None)


def test_questions_over_jsonl(tmp_path: Path) -> None:
    rows = rows_with_paths(tmp_path / "img", 3)
    rows = [row | {"question": f"a zebra {row['id']} quagga gnu", "answer": "yes"} for row in rows]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    template = "{question} Answer with one word."
    made = planned(tmp_path, path, mode="generate", prompt_template=template)
    assert made.columns.roles == {"image": "image", "id": "id", ".question": "question"}
    said = list(prompt_notices(made.config, made.manifest, made.columns, made.asking))
    assert "zebra row-0" in said[0]
    with pytest.raises(UserError, match="no column 'colour'; it has id, image, stars, question"):
        planned(tmp_path, path, mode="generate", prompt_template="{colour} ?")


def test_old_texts_are_prompts_only_where_they_are_named(tmp_path: Path) -> None:
    write_img2dataset(tmp_path / "tars")
    write_images(tmp_path / "photos", 3)
    for name in ("tars", "photos"):
        with pytest.raises(UserError, match=r"no column .prompt.; it has id, image, txt, json"):
            planned(tmp_path, tmp_path / name)
        made = planned(tmp_path, tmp_path / name, columns="prompt=txt")
        assert made.columns.roles["prompt"] == "txt"
        (line, *_) = prompt_notices(made.config, made.manifest, made.columns)
        assert "old text 0" in line
    assert not (tmp_path / "out").exists()
