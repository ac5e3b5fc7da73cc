"""The replay passes on the recorded cases, and fails when it should."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from trio.conformance.__main__ import main

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CASES = [c["name"] for c in json.loads((GOLDEN / "trio_llama/index.json").read_text())["cases"]]


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the recorded TRIO cases, to be spoilt."""
    shutil.copytree(GOLDEN / "trio_llama", tmp_path / "trio_llama")
    return tmp_path


@pytest.mark.parametrize("name", CASES)
def test_every_recorded_case_passes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(GOLDEN), "--only", f"trio_llama/{name}"]) == 0
    out = capsys.readouterr().out
    assert f"trio_llama/{name}: ok" in out
    assert "1 of 1 cases passed" in out


def test_the_folder_of_one_kind_works_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(GOLDEN / "trio_llama"), "--only", "pub4"]) == 0


def test_an_unknown_kind_is_not_a_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(GOLDEN / "visionzip", tmp_path / "pixelzip")
    assert main([str(tmp_path)]) == 1
    assert "pixelzip: 3 cases not yet supported" in capsys.readouterr().out


SPOILT = [
    ("pub0", "stage1.selected_0"),
    ("pub0", "stage0.order_0"),
    ("pub0", "stage2.scores_0"),
    ("pub0", "stage0.grad_norm_all"),
    ("pub0", "stage0.loss"),
    ("pub0", "stage1.features_in"),
    ("pub0", "stage1.position_ids_out"),
    ("pub0", "final_hidden"),
    ("pub0", "last_hidden"),
    ("pub0", "last_logits"),
    ("pub0", "kv_lens"),
    ("pub0", "decode_logits"),
    ("pub_batch1", "stage0.mask_out"),
    ("pub_batch1", "stage1.scores_1"),
    ("pub_batch1", "stage1.features_out"),
]


@pytest.mark.parametrize(("case", "tensor"), SPOILT)
def test_a_spoilt_record_is_noticed(
    copied: Path, case: str, tensor: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied / f"trio_llama/{case}.safetensors"
    tensors = load_file(path)
    flat = tensors[tensor].view(-1)
    flat[0] += 1e-3 if flat.is_floating_point() else 1
    save_file(tensors, path)
    assert main([str(copied), "--only", case]) == 1
    out = capsys.readouterr().out
    assert f"trio_llama/{case}: FAIL" in out
    assert tensor.split(".")[-1].rstrip("_01") in out


@pytest.mark.parametrize(
    ("fact", "value"),
    [("tau", 0.7), ("layer_list", [2, 3, 5]), ("image_token_posi", [4]), ("valid_lens", [88])],
)
def test_other_settings_do_not_pass(copied: Path, fact: str, value: object) -> None:
    index = copied / "trio_llama/index.json"
    content = json.loads(index.read_text())
    content["cases"][0][fact] = value
    index.write_text(json.dumps(content))
    assert main([str(copied), "--only", "pub0"]) == 1


def complaint(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_a_missing_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is not a directory" in complaint([str(tmp_path / "nowhere")], capsys)
    assert "holds no <kind>/index.json" in complaint([str(tmp_path)], capsys)


def test_a_name_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert "trio_llama" in complaint([str(GOLDEN), "--only", "trio_lama"], capsys)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"cases": []}', '{"cases": [1]}'])
def test_a_garbled_index(copied: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (copied / "trio_llama/index.json").write_text(text)
    assert "index.json" in complaint([str(copied)], capsys)


@pytest.mark.parametrize("fact", ["file", "model", "layer_list", "stages", "image_tokens"])
def test_a_missing_fact(copied: Path, fact: str, capsys: pytest.CaptureFixture[str]) -> None:
    index = copied / "trio_llama/index.json"
    content = json.loads(index.read_text())
    del content["cases"][0][fact]
    index.write_text(json.dumps(content))
    assert f"no '{fact}'" in complaint([str(copied)], capsys)


def test_missing_and_broken_tensor_files(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copied / "trio_llama/pub0.safetensors"
    tensors = load_file(path)
    del tensors["stage1.features_in"]
    save_file(tensors, path)
    assert "'stage1.features_in' is missing" in complaint([str(copied), "--only", "pub0"], capsys)
    path.write_bytes(b"nothing")
    assert "not a readable safetensors" in complaint([str(copied), "--only", "pub0"], capsys)
    path.unlink()
    assert "pub0.safetensors" in complaint([str(copied), "--only", "pub0"], capsys)


def test_weights_that_do_not_fit(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copied / "trio_llama/model_a.safetensors"
    weights = load_file(path)
    del weights["model.norm.weight"]
    save_file(weights, path)
    assert "model.norm.weight" in complaint([str(copied), "--only", "pub0"], capsys)
    weights["model.norm.weight"] = torch.ones(3)
    save_file(weights, path)
    assert "does not fit" in complaint([str(copied), "--only", "pub0"], capsys)
