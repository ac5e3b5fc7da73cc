"""What makes two runs different, named."""

import json
from pathlib import Path
from typing import Any

import pytest

from trio.job.resume import fingerprint
from trio.job.resume.fingerprint import Fingerprint
from trio.job.settings import made_of
from trio.version import VERSION


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    (directory / "additional_chat_templates").mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (directory / "additional_chat_templates" / "tool.jinja").write_text("x")
    (directory / "README.md").write_text("not read")
    (directory / "pytorch_model.bin").write_text("not read")
    return directory


def take(model: Path, **changes: Any) -> Fingerprint:
    return fingerprint.take(made_of(model=str(model), retention=0.5, **changes))


def test_it_survives_json(model: Path) -> None:
    found = take(model, input=("a", "b"))
    assert Fingerprint.from_json(found.to_json()) == found
    assert found.differences(found) == found.notices(found) == []
    assert found.version == VERSION and found.libraries["torch"] != "unknown"


def test_what_differs_is_named(model: Path) -> None:
    before = take(model, prompt=("a",), max_pixels=1000)
    (model / "config.json").write_text('{"x": 1}')
    (model / "tokenizer.json").write_text("{}")
    (model / "additional_chat_templates" / "tool.jinja").unlink()
    (model / "README.md").write_text("edited")
    assert before.differences(take(model, prompt=("b",), actors=3, min_pixels=100)) == [
        "prompt: 'a', now 'b'",
        "min_pixels: None, now 100",
        "max_pixels: 1000, now None",
        "file additional_chat_templates/tool.jinja has changed",
        "file config.json has changed",
        "file tokenizer.json has changed",
    ]


def test_another_version_of_a_library_is_a_notice(model: Path) -> None:
    now = take(model, prompt=("b",))
    said = json.loads(now.to_json())
    said["libraries"]["torch"] = "2.0.0"
    old = Fingerprint(**said)
    assert old.differences(now) == []
    (notice,) = old.notices(now)
    assert notice.startswith("torch was 2.0.0 and is 2.")


def test_weights_are_hashed_at_their_ends(model: Path) -> None:
    path, body, digests = model / "model.safetensors", bytearray(3 << 20), []
    for place in (0, len(body) // 2, len(body) - 1):
        path.write_bytes(body)
        digests.append(fingerprint.model_files(str(model))["model.safetensors"])
        body[place] += 1
    path.write_bytes(body)
    digests.append(fingerprint.model_files(str(model))["model.safetensors"])
    path.write_bytes(bytes(body) + b"\0")
    digests.append(fingerprint.model_files(str(model))["model.safetensors"])
    first, head, middle, tail, longer = digests
    assert head == middle and len({first, head, tail, longer}) == 4


def test_the_bundled_model_is_its_files() -> None:
    files = fingerprint.take(made_of()).model_files
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(files)


def test_the_code_of_a_users_adapter_is_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    code = tmp_path / "their_adapter.py"
    config = made_of(adapters=("my_vl=their_adapter:Theirs", "other=not_here:Other"))
    code.write_text("import nothing_of_this_is_run")
    before = fingerprint.take(config)
    assert before.model_files["not_here (of --adapters)"] == ""
    code.write_text("changed = True")
    assert before.differences(fingerprint.take(config)) == [
        "file their_adapter (of --adapters) has changed"
    ]
