"""The replay of VisionZip passes on the recorded cases, and fails when it should."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trio.conformance import visionzip
from trio.conformance.__main__ import main
from trio.conformance.files import read_cases
from trio.encoders.clip_hooks import Watched
from trio.encoders.reduce import Contextual
from trio.errors import UserError

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
INDEX = json.loads((GOLDEN / "visionzip/index.json").read_text())
CASES = [case["name"] for case in INDEX["cases"]]


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the recorded cases, to be spoilt."""
    shutil.copytree(GOLDEN / "visionzip", tmp_path / "visionzip")
    return tmp_path


def misses(directory: Path, name: str) -> list[str]:
    (case,) = [c for c in read_cases(directory) if c.kind == "visionzip" and c.name == name]
    return visionzip.replay(case).misses


@pytest.mark.parametrize("name", CASES)
def test_every_recorded_case_passes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(GOLDEN), "--only", f"visionzip/{name}"]) == 0
    out = capsys.readouterr().out
    assert f"visionzip/{name}: ok" in out
    for quantity in ("tokens", "cls_attention_sum", "hidden_penultimate", "metric"):
        assert f"{quantity} " in out


RECORDED = [
    "all_indices",
    "tokens",
    "cls_attention_sum",
    "hidden_penultimate",
    "metric",
    "context_target_indices",
    "context_assignment",
    "context_counts",
]


def test_every_recorded_tensor_is_compared() -> None:
    tensors = load_file(GOLDEN / "visionzip/pub0.safetensors")
    assert {*RECORDED, "pixel_values"} == tensors.keys()


@pytest.mark.parametrize("tensor", [*RECORDED, "pixel_values"])
def test_a_spoilt_record_is_noticed(copied: Path, tensor: str) -> None:
    path = copied / "visionzip/pub1.safetensors"
    tensors = load_file(path)
    flat = tensors[tensor].view(-1)
    flat[-1] += 1e-2 if flat.is_floating_point() else 1
    save_file(tensors, path)
    found = misses(copied, "pub1")
    assert found
    if tensor != "pixel_values":
        assert all(miss.startswith((tensor, "sources")) for miss in found)


def other_settings(directory: Path, **facts: Any) -> None:
    index = directory / "visionzip/index.json"
    content = json.loads(index.read_text())
    content["cases"][0] |= facts
    index.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("fact", "value"),
    [("dominant", 21), ("contextual", 7), ("top_k", 22), ("num_patches", 195), ("batch", 2)],
)
def test_other_settings_do_not_pass(copied: Path, fact: str, value: int) -> None:
    other_settings(copied, **{fact: value})
    assert misses(copied, "pub0")


def test_empty_groups_are_compared_too(copied: Path) -> None:
    """As many contextual tokens as patches are left: nothing is merged into any."""
    path = copied / "visionzip/pub0.safetensors"
    tensors = load_file(path)
    order = tensors["all_indices"][0]
    rest = sorted({*range(1, 197)} - {*order.tolist()})
    hidden = tensors["hidden_penultimate"]
    places = torch.tensor([*sorted(order.tolist()), *rest])
    count = len(rest)
    tensors |= {
        "tokens": hidden[:, places],
        "context_target_indices": torch.tensor([rest], dtype=torch.int32),
        "context_assignment": torch.empty(1, 0, dtype=torch.int32),
        "context_counts": torch.zeros(1, count, dtype=torch.int32),
    }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    other_settings(copied, contextual=count)
    assert misses(copied, "pub0") == []


def spoilt(fault: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Of a function, one whose result goes through `fault`."""
    return lambda plain: lambda *arguments: fault(plain(*arguments))


def in_one_group(context: Contextual) -> Contextual:
    groups = torch.zeros_like(context.group_ICP)
    groups[:, 0] = context.group_ICP.any(dim=1)
    return replace(context, group_ICP=groups)


FAULTS: dict[str, tuple[Any, str, Callable[[Any], Any]]] = {
    "mean over heads": (Watched, "class_attention", spoilt(lambda rows: rows / 4)),
    "attention of a patch": (
        Watched,
        "_see_query",
        lambda plain: lambda self, *call: plain(self, *call[:2], call[2][:, 1:]),
    ),
    "keys of one head": (
        Watched,
        "mean_keys",
        lambda _: lambda self: self._by_head(self._key_ISX)[:, :, 0],
    ),
    "hidden states that enter the layer": (
        Watched,
        "_see_hidden",
        lambda plain: lambda self, *call: plain(self, *call[:2], call[1][0]),
    ),
    "one group": (visionzip, "contextual_groups", spoilt(in_one_group)),
    "other tokens": (
        visionzip,
        "visionzip",
        spoilt(lambda got: replace(got, tokens_TD=got.tokens_TD * 1.001)),
    ),
    "other order": (
        visionzip,
        "visionzip",
        spoilt(lambda got: replace(got, sources_T=got.sources_T.flip(0))),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_reported(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, name, change = FAULTS[fault]
    monkeypatch.setattr(where, name, change(getattr(where, name)))
    assert misses(GOLDEN, "pub0")


def complaint(directory: Path) -> str:
    with pytest.raises(UserError) as caught:
        misses(directory, "pub0")
    return str(caught.value)


def test_what_cannot_be_used(copied: Path) -> None:
    other_settings(copied, dominant=190, contextual=20)
    assert "190 dominant and 20 contextual tokens cannot be made of 196" in complaint(copied)
    path = copied / "visionzip/model_a.safetensors"
    weights: dict[str, Tensor] = load_file(path)
    norm = weights.pop("vision_model.pre_layrnorm.weight")
    save_file(weights, path)
    assert "weights missing ['pre_layrnorm.weight']" in complaint(copied)
    save_file({**weights, "vision_model.pre_layrnorm.weight": norm[:3].clone()}, path)
    assert "does not fit the recorded config" in complaint(copied)
    other_settings(copied, model="b")
    assert "no config and file for model 'b'" in complaint(copied)
