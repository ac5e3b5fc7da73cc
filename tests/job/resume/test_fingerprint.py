"""What makes two runs different, named."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from trio.errors import UserError
from trio.job.resume import checkpoint_defaults, fingerprint
from trio.job.resume.fingerprint import Fingerprint
from trio.job.settings import made_of
from trio.version import VERSION

ROOT = Path(__file__).resolve().parents[3]
COMMIT, OTHER = "a" * 40, "b" * 40


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
    before = take(model, prompt="a", max_pixels=1000)
    (model / "config.json").write_text('{"x": 1}')
    (model / "tokenizer.json").write_text("{}")
    (model / "additional_chat_templates" / "tool.jinja").unlink()
    (model / "README.md").write_text("edited")
    assert before.differences(take(model, prompt="b", actors=3, min_pixels=100)) == [
        "prompt: 'a', now 'b'",
        "min_pixels: None, now 100",
        "max_pixels: 1000, now None",
        "model file additional_chat_templates/tool.jinja is gone",
        "model file config.json has changed",
        "model file tokenizer.json is new",
    ]


def test_another_version_of_ours_is_a_difference_one_of_a_library_a_notice(model: Path) -> None:
    now = take(model, prompt="b")
    said = json.loads(now.to_json())
    said["version"], said["settings"]["prompt"] = "0.0.9", "a"
    said["libraries"]["torch"] = "2.0.0"
    old = Fingerprint(**said)
    assert old.differences(now) == [f"another version of this package: 0.0.9, now {VERSION}"]
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
        "model file their_adapter (of --adapters) has changed"
    ]


def test_a_directory_has_no_revision(model: Path) -> None:
    config = made_of(model=str(model))
    assert fingerprint.pin_revision(config) == config
    with pytest.raises(UserError, match="is no hub id"):
        fingerprint.pin_revision(config.replace(revision="main"))


def test_a_run_that_goes_on_keeps_to_its_commit() -> None:
    config = made_of(model="org/name")
    earlier = config.replace(revision=COMMIT)
    assert fingerprint.pin_revision(config, earlier) == earlier
    asked = config.replace(revision=OTHER)
    assert fingerprint.pin_revision(asked, earlier).model.revision == OTHER


class LibrarysOwnError(Exception):
    """Of whatever library of HTTP a version of the hub's client has."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stands in for the hub's answer: a commit, or an error."""
    from huggingface_hub import HfApi

    def answer(result: object) -> None:
        def model_info(self: HfApi, name: str, **_: Any) -> Any:
            if isinstance(result, Exception):
                raise result
            return type("Info", (), {"sha": result})

        monkeypatch.setattr(HfApi, "model_info", model_info)

    return answer


def test_the_commit_of_a_hub_id(hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    hub(COMMIT)
    assert fingerprint.pin_revision(made_of(model="org/name")).model.revision == COMMIT
    for error in (ConnectionError("no network"), LibrarysOwnError("no network")):
        hub(error)
        with pytest.raises(UserError, match=r"org/name: the hub does not answer \(no network\)"):
            fingerprint.commit("org/name", None)
    assert fingerprint.commit("org/name", OTHER) == OTHER
    refs = tmp_path / "models--org--name" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text(OTHER)
    (refs.parent / "snapshots" / OTHER).mkdir(parents=True)
    assert fingerprint.commit("org/name", None) == OTHER


def test_a_hub_id_that_cannot_be_one_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match="check the name"):
        fingerprint.commit("a//b", None)


@pytest.mark.parametrize("kind", [GatedRepoError, RepositoryNotFoundError, LibrarysOwnError])
def test_a_file_that_may_not_be_read_is_one_line(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> str:
        raise kind.__new__(kind, "Access to it is restricted")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refused)
    with pytest.raises(UserError, match=r"pruning_config.json of org/gated cannot.*HF_TOKEN"):
        checkpoint_defaults.of_hub("org/gated", COMMIT)


@pytest.mark.slow
def test_offline_the_cache_answers_and_the_processor_is_the_commits(tmp_path: Path) -> None:
    demo = ROOT / "trio" / "demo" / "model"
    repo = tmp_path / "models--org--name"
    for commit, template in ((COMMIT, "one"), (OTHER, "two")):
        snapshot = repo / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for path in demo.iterdir():
            (snapshot / path.name).symlink_to(path)
        (snapshot / "chat_template.jinja").unlink()
        (snapshot / "chat_template.jinja").write_text(template)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    code = (
        "from trio.job.resume.fingerprint import commit\n"
        "from trio.engine.loading import load\n"
        "print(commit('org/name', None))\n"
        f"for revision in (None, {COMMIT!r}, {OTHER!r}):\n"
        "    print(load('org/name', device='cpu', revision=revision)[1].chat_template)\n"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == [COMMIT, "one", "one", "two"], done.stderr
