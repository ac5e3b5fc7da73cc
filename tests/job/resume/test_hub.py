"""Which commit of a hub id a run means, and what is known of its files before any engine starts."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from tests.job.output.test_output_directory import RUN
from trio.decoder import default_dtype
from trio.errors import UserError
from trio.job import plan
from trio.job.resume import decoding_rules, hub
from trio.job.resume.checkpoint_defaults import dtype_resolved, pruning_resolved
from trio.job.settings import made_of

ROOT = Path(__file__).resolve().parents[3]
COMMIT, OTHER = "a" * 40, "b" * 40


def test_a_directory_has_no_revision(tmp_path: Path) -> None:
    config = made_of(model=str(tmp_path))
    assert hub.pin_revision(config) == config
    with pytest.raises(UserError, match="is for a hub id as --model"):
        hub.pin_revision(config.replace(revision="main"))


def test_a_run_that_goes_on_keeps_to_its_commit() -> None:
    config = made_of(model="org/name")
    earlier = config.replace(revision=COMMIT)
    assert hub.pin_revision(config, earlier) == earlier
    asked = config.replace(revision=OTHER)
    assert hub.pin_revision(asked, earlier).model.revision == OTHER


def test_the_dtype_is_decided_once_and_kept_to_on_other_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text('{"dtype": "float16"}')
    config = made_of(model=str(tmp_path))
    for there, name in ((False, "float32"), (True, "bfloat16")):
        monkeypatch.setattr(default_dtype, "has_matrix_units", lambda _, there=there: there)
        resolved, why = dtype_resolved(config, gpu=False)
        assert resolved == config.replace(dtype=name)
        assert why is not None and why.startswith(f"dtype {name}: ") and "amx_bf16" in why
    resolved, why = dtype_resolved(config, gpu=True)
    assert resolved.model.dtype == "bfloat16" and why is not None and "is float16" in why
    assert dtype_resolved(resolved, gpu=False) == (resolved, None)

    earlier = replace(RUN, config=resolved)
    assert plan._settled(config, earlier).model.dtype == "bfloat16"
    asked = config.replace(dtype="float32")
    assert plan._settled(asked, earlier).model.dtype == "float32"  # which is refused


class LibrarysOwnError(Exception):
    """Of whatever library of HTTP a version of the hub's client has."""


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of org/name, on a machine without a network."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--org--name"
    for folder in ("refs", f"snapshots/{COMMIT}", f".no_exist/{COMMIT}"):
        (repo / folder).mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    return repo


def test_the_commit_of_a_hub_id(offline: Path) -> None:
    with pytest.raises(UserError, match=r"--model org/name: the hub does not give config.json"):
        hub.pin_revision(made_of(model="org/name"))
    (offline / "snapshots" / COMMIT / "config.json").write_text("{}")
    assert hub.pin_revision(made_of(model="org/name")).model.revision == COMMIT


def test_without_a_network_the_cache_says_what_a_model_has(
    offline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = made_of(model="org/name", revision=COMMIT)
    with pytest.raises(UserError, match="it is not in the cache"):
        pruning_resolved(config)
    assert decoding_rules.read(config) is None
    snapshot = offline / "snapshots" / COMMIT
    (snapshot / "config.json").write_text('{"repetition_penalty": 1.5}')
    with pytest.raises(UserError, match="it is not in the cache"):
        pruning_resolved(config)  # its weights were never here
    (snapshot / "model.safetensors").touch()
    resolved = pruning_resolved(config)
    assert "pruning_config.json" in (told := capsys.readouterr().out) and "built-in" in told
    assert resolved.pruning.fill_up == "mixed"
    for name in ("pruning_config.json", "generation_config.json"):
        (offline / ".no_exist" / COMMIT / name).touch()
    assert pruning_resolved(config) == resolved and not capsys.readouterr().out
    assert "repetition_penalty 1.5" in decoding_rules.lines(config, decoding_rules.read(config))[0]
    (offline / ".no_exist" / COMMIT / "pruning_config.json").rename(
        snapshot / "pruning_config.json"
    )
    (snapshot / "pruning_config.json").write_text('{"fill_up": "reference"}')
    assert pruning_resolved(config).pruning.fill_up == "reference"


def test_a_hub_id_that_cannot_be_one_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match="check the name"):
        hub.pin_revision(made_of(model="a//b"))


@pytest.mark.parametrize("kind", [GatedRepoError, RepositoryNotFoundError, LibrarysOwnError])
def test_a_file_that_may_not_be_read_is_one_line(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> str:
        raise kind.__new__(kind, "Access to it is restricted")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refused)
    with pytest.raises(UserError, match=r"--model org/gated: the hub does not give .*HF_TOKEN"):
        pruning_resolved(made_of(model="org/gated", revision=COMMIT))


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
        "from trio.job.resume.hub import pin_revision\n"
        "from trio.job.settings import made_of\n"
        "from trio.engine.loading import load\n"
        "print(pin_revision(made_of(model='org/name')).model.revision)\n"
        f"for revision in (None, {COMMIT!r}, {OTHER!r}):\n"
        "    print(load('org/name', device='cpu', revision=revision)[1].chat_template)\n"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == [COMMIT, "one", "one", "two"], done.stderr
