"""The replay passes on the recorded cases, and fails when it should."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.conformance.__main__ import REPLAYS, main

GOLDEN = Path(__file__).resolve().parents[1] / "golden"

# Inputs of a replay, which may be changed without effect on what is compared.
INPUTS = {
    "attention_mask",
    "cls_attention",
    "components",
    "embed_tokens",
    "grid_thw",
    "hidden_states",
    "image_embeds",
    "image_features",
    "image_newline",
    "image_sizes",
    "instruction_ids",
    "inputs_embeds",
    "pixel_values",
    "position_ids",
    "text_embeds",
    "text_embeds_seq",
    "text_ids",
    "tiles_per_image",
    "vision_space_features",
}
# Of each kind a case, and a setting of it that would change the outcome.
SPOILT: dict[str, tuple[str, dict[str, Any]]] = {
    "cdpruner": ("pub3", {"epsilon_denominator": 0.1}),
    "eadp": ("pub0", {"alpha": 0.6}),
    "eadp_anyres": ("pub2", {"visual_token_num": 13}),
    "eadp_qwen": ("pub2", {"beta": 1.0}),
    "eadp_siglip": ("pub1", {"alpha": 0.6}),
    "prunesid": ("pub0", {"need_token_num": 60}),
    "scope": ("pub3", {"combined": "multi"}),
    "trio_llama": ("pub0", {"tau": 0.7}),
    "trio_qwen": ("pub0", {"layer_list": [1, 5]}),
    "visionzip": ("pub1", {"dominant": 21}),
}


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[str], Path]:
    """Copies the recorded cases of a kind, to be spoilt, and gives their folder."""
    return lambda kind: Path(shutil.copytree(GOLDEN / kind, tmp_path / kind))


def edit(folder: Path, case: str, **facts: Any) -> None:
    """Set facts of a case; `...` takes one away."""
    content = json.loads((folder / "index.json").read_text())
    (own,) = [own for own in content["cases"] if own["name"] == case]
    own |= facts
    for fact in [fact for fact in facts if own[fact] is ...]:
        del own[fact]
    (folder / "index.json").write_text(json.dumps(content))


def write(path: Path, tensors: dict[str, Tensor], **changed: Tensor) -> None:
    save_file({name: own.contiguous() for name, own in (tensors | changed).items()}, path)


@pytest.mark.parametrize("kind", sorted(REPLAYS))
def test_every_recorded_case_passes(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    cases = len(json.loads((GOLDEN / kind / "index.json").read_text())["cases"])
    assert main([str(GOLDEN), "--only", kind]) == 0
    out = capsys.readouterr().out
    assert f"{cases} of {cases} cases passed" in out and out.count(": ok, ") == cases
    # With a cache the reference attends without a causal mask, and that is no pass of the rest.
    assert ("2 of them compared only so far" in out) == (kind == "trio_qwen")


@pytest.mark.parametrize("kind", sorted(REPLAYS))
def test_whatever_of_a_case_is_falsified_is_noticed(
    kind: str, copied: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """One value of one tensor at a time, of those that differ by a number alone the first; a tensor
    too many; and another setting."""
    folder, (case, setting) = copied(kind), SPOILT[kind]
    path = folder / f"{case}.safetensors"
    tensors = load_file(path)
    names = {re.sub(r"\d+", "", name): name for name in sorted(tensors, reverse=True)}
    outputs = [name for short, name in names.items() if short.rstrip("_") not in INPUTS]
    assert len(outputs) > 4

    def noticed(changed: dict[str, Tensor]) -> bool:
        write(path, tensors, **changed)
        return main([str(folder), "--only", case]) == 1

    for name in outputs:
        value = tensors[name].clone()
        value.view(-1)[-1] += 1
        assert noticed({name: value}), name
    assert noticed({"more": torch.zeros(1)})
    assert not noticed({})
    edit(folder, case, **setting)
    capsys.readouterr()
    assert main([str(folder), "--only", case]) == 1
    assert f"{kind}/{case}: FAIL" in capsys.readouterr().out


def test_a_kind_that_is_not_there_is_named_and_no_pass(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(GOLDEN / "scope", tmp_path / "scope")
    shutil.copytree(GOLDEN / "scope", tmp_path / "telescope")
    assert main([str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "telescope: 2 cases skipped" in out and "2 of 4 cases passed" in out
    assert main([str(tmp_path / "scope")]) == 0


def complaint(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_names_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is not a directory" in complaint([str(tmp_path / "nowhere")], capsys)
    assert "holds no <kind>/index.json" in complaint([str(tmp_path)], capsys)
    assert "trio_llama" in complaint([str(GOLDEN), "--only", "trio_lama"], capsys)


def test_a_garbled_index(copied: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = copied("scope")
    for text in ("", "{", "[]", "{}", '{"cases": []}', '{"cases": [1]}'):
        (folder / "index.json").write_text(text)
        assert "index.json" in complaint([str(folder)], capsys)


def test_tensors_that_are_missing(
    copied: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied("scope")
    path = folder / "pub2.safetensors"
    tensors = load_file(path)
    del tensors["selected_gain"]
    save_file(tensors, path)
    assert "'selected_gain' is missing" in complaint([str(folder)], capsys)
    path.write_bytes(b"nothing")
    assert "not a readable safetensors" in complaint([str(folder)], capsys)
    path.unlink()
    assert "pub2.safetensors" in complaint([str(folder)], capsys)


@pytest.mark.parametrize(
    ("kind", "case", "facts", "said"),
    [
        ("cdpruner", "pub3", {"variant": "pixtral"}, "'pixtral' is none of llava, qwen"),
        ("eadp", "pub0", {"T": ...}, "no 'T'"),
        ("eadp", "pub0", {"selection": {"K": 5}}, "not 5"),
        ("eadp_siglip", "pub1", {"local_aggregation": {"strategy": "top"}}, "not by top"),
        ("prunesid", "pub0", {"variant": "pixtral"}, "'pixtral' is none of llava, qwen"),
        ("scope", "pub3", {"combined": "max"}, "combined is 'max'"),
        ("trio_llama", "pub4", {"model": "b"}, "no config and file for model 'b'"),
        ("trio_llama", "pub4", {"k_pos": 8}, "4 positions here, not 8"),
        ("trio_qwen", "pub0", {"image_start_index": 80}, "no image at 80..144 among 89"),
        ("visionzip", "pub0", {"dominant": 190, "contextual": 20}, "cannot be made of 196"),
    ],
)
def test_facts_that_cannot_be_run(
    kind: str,
    case: str,
    facts: dict[str, Any],
    said: str,
    copied: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = copied(kind)
    edit(folder, case, **facts)
    assert said in complaint([str(folder), "--only", case], capsys)


@pytest.mark.parametrize(
    ("kind", "weight"),
    [
        ("trio_llama", "model.norm.weight"),
        ("visionzip", "vision_model.pre_layrnorm.weight"),
    ],
)
def test_weights_that_do_not_fit(
    kind: str,
    weight: str,
    copied: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = copied(kind) / "model_a.safetensors"
    weights = load_file(path)
    whole = weights.pop(weight)
    save_file(weights, path)
    only = [str(path.parent), "--only", SPOILT[kind][0]]
    assert weight.removeprefix("vision_model.") in complaint(only, capsys)
    write(path, weights, **{weight: whole[:3]})
    assert "does not fit the recorded config" in complaint(only, capsys)
