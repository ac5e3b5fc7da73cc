"""pruning_config.json beside a model: read alike by patch, Engine and jobs; what is given wins."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import caption
import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
import yaml

import trio
from tests.tiny.llava import save_tiny_checkpoint
from trio.demo import CAPTION_PROMPT, MODEL
from trio.demo.scenes import make_scene
from trio.engine import loading
from trio.engine.engine import Engine
from trio.engine.loading import load, load_outline
from trio.engine.request import Prepared, Request, Sampling
from trio.errors import UserError
from trio.families.hub_defaults import _tell_unknown
from trio.families.registry import adapt
from trio.job.command import main
from trio.pruning.options import Pruning
from trio.pruning.pruning_config import FILE, read
from trio.pruning.schedule import ScheduleShape


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    return load(str(MODEL), device="cpu")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_tiny_checkpoint(tmp_path / "model", layers=8)


def write(directory: Path, **content: Any) -> None:
    (directory / FILE).write_text(json.dumps(content))


def settled(directory: Path, pruning: Pruning) -> Pruning:
    return adapt(load(str(directory), device="cpu")[0]).settle(pruning)


def test_the_demo_is_pruned_as_its_file_says(demo: tuple[Any, Any]) -> None:
    pruning = adapt(demo[0]).settle(Pruning(retention=1 / 9))
    assert (pruning.proxy_positions, pruning.position_ids) == ("with_last", "renumber")
    assert (pruning.proxy_layer, pruning.fill_up, pruning.similarity_threshold) == (
        "next", "mixed", 0.8,
    )  # fmt: skip
    assert pruning.stages(576, 16)[0][0] == 0
    given = Pruning(retention=1 / 9, proxy_positions="reference", schedule_shape="family")
    paper = adapt(demo[0]).settle(given)
    assert paper.proxy_positions == "reference" and paper.stages(576, 16)[0][0] == 1


def test_one_ninth_and_one_eighteenth_begin_at_the_same_layer(demo: tuple[Any, Any]) -> None:
    adapter = adapt(demo[0])
    for retention in (1 / 3, 1 / 9, 1 / 18):
        stages = adapter.settle(Pruning(retention=retention)).stages(576, 16)
        assert [layer for layer, _ in stages] == [0, 5, 8]


def test_patch_and_engine_answer_the_same_on_the_demo(demo: tuple[Any, Any]) -> None:
    model, processor = demo
    scene = make_scene(np.random.default_rng(9001), "heldout")
    pruning = Pruning(retention=1 / 18)
    engine = Engine(model, processor, pruning=pruning, sampling=Sampling(max_new_tokens=12))
    request = Request(id=0, prompt=CAPTION_PROMPT, images=(scene.image,))
    (result,) = engine.generate([request])
    assert result.visual_tokens_stages is not None and len(result.visual_tokens_stages) == 3
    prepared = engine.prepare(request)
    assert isinstance(prepared, Prepared)
    trio.patch(model, pruning)
    try:
        inputs = {"input_ids": torch.tensor([prepared.input_ids]), **_pixels(prepared)}
        with torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    finally:
        trio.unpatch(model)
    answer = out[0, len(prepared.input_ids) :].tolist()
    assert answer[: len(result.token_ids)] == result.token_ids


def _pixels(prepared: Any) -> dict[str, Any]:
    (image,) = prepared.image_inputs
    return {name: value for name, value in image.items() if name == "pixel_values"}


def test_a_file_decides_what_is_left_open(checkpoint: Path) -> None:
    assert settled(checkpoint, Pruning(retention=0.5)).proxy_positions == "reference"
    write(
        checkpoint,
        proxy_positions="last",
        fill_up="reference",
        similarity_threshold=0.5,
        schedule_shape={"1/2": "0:0.9,1:0.3@2", "other": "start"},
        about={"anything": [1]},
    )
    found = settled(checkpoint, Pruning(retention=0.5))
    assert (found.proxy_positions, found.fill_up, found.similarity_threshold) == (
        "last", "reference", 0.5,
    )  # fmt: skip
    assert found.schedule_shape == ScheduleShape(2, ((0, 0.9), (1, 0.3)))
    other = settled(checkpoint, Pruning(retention=0.7)).schedule_shape
    assert isinstance(other, ScheduleShape) and other.stages[0][0] == 0 and len(other.stages) == 3
    given = settled(
        checkpoint, Pruning(retention=0.5, fill_up="mixed", proxy_positions="reference")
    )
    assert (given.fill_up, given.proxy_positions) == ("mixed", "reference")


COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture
def hub(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of a hub without a network, with the checkpoint as org/name; gives its place."""
    repo = tmp_path / "hub" / "models--org--name"
    shutil.copytree(checkpoint, repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setattr(huggingface_hub.constants, name, str(tmp_path / "hub"))
    monkeypatch.setattr(transformers.utils.hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    _tell_unknown.cache_clear()
    return repo


def test_a_cache_that_does_not_know_is_told_of_once(
    hub: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def found(pruning: Pruning) -> Pruning:
        return adapt(load_outline("org/name")[0]).settle(pruning)

    pruning = Pruning(retention=0.5)
    assert found(pruning) == found(pruning)
    (line,) = (record.getMessage() for record in caplog.records if FILE in record.getMessage())
    assert line.startswith(f"{FILE} of org/name: the hub's cache here does not know")
    _tell_unknown.cache_clear()
    caplog.clear()
    absent = hub / ".no_exist" / COMMIT / FILE
    absent.parent.mkdir(parents=True)
    absent.touch()
    assert found(pruning).fill_up == "mixed"
    absent.unlink()
    write(hub / "snapshots" / COMMIT, fill_up="reference")
    assert found(pruning).fill_up == "reference"
    assert not [record for record in caplog.records if FILE in record.getMessage()]


def test_the_file_is_that_of_the_revision(hub: Path) -> None:
    other = "f" * 40
    shutil.copytree(hub / "snapshots" / COMMIT, hub / "snapshots" / other)
    write(hub / "snapshots" / COMMIT, fill_up="mixed")
    write(hub / "snapshots" / other, fill_up="reference")
    models = (load_outline("org/name", revision=other)[0], load("org/name", revision=other)[0])
    for model in models:
        assert adapt(model).settle(Pruning(retention=0.5)).fill_up == "reference"


def test_an_outline_is_counted_by_the_same_file_as_the_model(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetched(model: str, name: str, **_: Any) -> None:
        write(hub / "snapshots" / COMMIT, fill_up="reference")

    monkeypatch.setattr(loading, "cached_file", fetched)
    outline = adapt(load_outline("org/name")[0])
    assert outline.settle(Pruning(retention=0.5)).fill_up == "reference"


def test_a_model_saved_elsewhere_has_what_is_built_in(checkpoint: Path, tmp_path: Path) -> None:
    write(checkpoint, fill_up="reference", similarity_threshold=0.5, proxy_positions="last")
    model, _ = load(str(checkpoint), device="cpu")
    model.save_pretrained(tmp_path / "saved")
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        if (checkpoint / name).exists():
            shutil.copy(checkpoint / name, tmp_path / "saved")
    assert settled(checkpoint, Pruning(retention=0.5)).fill_up == "reference"
    found = settled(tmp_path / "saved", Pruning(retention=0.5))
    assert (found.fill_up, found.proxy_positions) == ("mixed", "reference")
    assert found.similarity_threshold == 0.8


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[1]", "expected a JSON object"),
        ('{"fill_upp": "mixed"}', "unknown key 'fill_upp'"),
        ('{"fill_up": "some"}', "fill_up: fill_up must be one of mixed, reference"),
        ('{"similarity_threshold": "high"}', r"similarity_threshold must be in \(-1, 1\]"),
        ('{"schedule_shape": "0:20,1:9"}', "schedule_shape: schedule shape '0:20,1:9'"),
        ('{"schedule_shape": {"few": "start"}}', "schedule_shape: 'few' is no retention"),
    ],
)
def test_a_broken_file_is_named_with_its_key(
    checkpoint: Path, content: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint / FILE).write_text(content)
    with pytest.raises(UserError, match=message) as told:
        read(checkpoint)
    assert FILE in str(told.value) and "\n" not in str(told.value)
    with pytest.raises(UserError, match=FILE):
        settled(checkpoint, Pruning(retention=0.5))
    assert main(caption.JOB, ["--dry-run", "--model", str(checkpoint)]) == 2
    assert FILE in capsys.readouterr().err


def test_a_job_writes_out_what_the_file_says(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(checkpoint, proxy_positions="with_last", schedule_shape={"1/2": "0:0.9,1:0.3@2"})
    flags = ["--dry-run", "--model", str(checkpoint), "--output", str(tmp_path / "out")]

    def resolved(*more: str) -> dict[str, Any]:
        assert main(caption.JOB, [*flags, *more]) == 0
        found: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
        return found

    found = resolved("--retention", "1/2")
    assert (found["proxy_positions"], found["fill_up"]) == ("with_last", "mixed")
    assert (found["schedule_shape"], found["similarity_threshold"]) == ("0:0.9,1:0.3@2", 0.8)
    given = resolved("--retention", "0.6", "--proxy-positions", "reference")
    assert (given["proxy_positions"], given["schedule_shape"]) == ("reference", "family")
    # What a run has written is the same again, whatever the file says by then.
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(found))
    write(checkpoint, proxy_positions="last")
    again = resolved("--config", str(tmp_path / "run.yaml"))
    assert again == found
