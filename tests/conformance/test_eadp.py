"""The replay of the EADP cases: that it passes, and what it notices."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trio.conformance import eadp
from trio.conformance.__main__ import main
from trio.conformance.files import read_cases

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CASES = [case["name"] for case in json.loads((GOLDEN / "eadp/index.json").read_text())["cases"]]
TENSORS = {name: load_file(GOLDEN / f"eadp/{name}.safetensors") for name in CASES}


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the recorded cases, to be spoilt."""
    shutil.copytree(GOLDEN / "eadp", tmp_path / "eadp")
    return tmp_path


def edit(folder: Path, case: str, change: Callable[[dict[str, Any]], object]) -> None:
    index = folder / "eadp/index.json"
    content = json.loads(index.read_text())
    change(next(own for own in content["cases"] if own["name"] == case))
    index.write_text(json.dumps(content))


def spoil(folder: Path, case: str, **tensors: Tensor) -> None:
    path = folder / f"eadp/{case}.safetensors"
    afresh = {
        name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.items()
    }
    save_file(load_file(path) | afresh, path)


def misses(case: str) -> set[str]:
    """The quantities in which a replay of the untouched case is wrong."""
    (own,) = [own for own in read_cases(GOLDEN / "eadp") if own.name == case]
    return {miss.split(":")[0] for miss in eadp.replay(own).misses}


@pytest.mark.parametrize("case", CASES)
def test_every_recorded_case_passes(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(GOLDEN), "--only", f"eadp/{case}"]) == 0
    assert "1 of 1 cases passed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("case", "tensor"), [(case, tensor) for case, own in TENSORS.items() for tensor in own]
)
def test_every_recorded_tensor_is_compared(copied: Path, case: str, tensor: str) -> None:
    value = TENSORS[case][tensor].clone()
    value.view(-1)[0] += 1e-2 if value.is_floating_point() else 1
    spoil(copied, case, **{tensor: value})
    assert main([str(copied), "--only", case]) == 1


def set_in(part: str, key: str, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda case: case[part].update({key: value})


def test_other_settings_do_not_pass(copied: Path) -> None:
    changes: list[Callable[[dict[str, Any]], object]] = [
        lambda case: case.update(alpha=0.6),
        lambda case: case.update(beta=1.1),
        lambda case: case.update(T=11),
        lambda case: case.update(B=2),
        lambda case: case.update(text_tokens_kept=3),
        lambda case: case.update(smoothed=False),
        set_in("entropy_filter", "T", 50.0),
        set_in("entropy_filter", "entropy_keep_ratio", 0.3),
        set_in("local_aggregation", "M_temp", 0.02),
        set_in("spatial_smoothing", "sigma", 1.5),
        set_in("spatial_smoothing", "kernel_size", 5),
    ]
    for change in changes:
        shutil.copy(GOLDEN / "eadp/index.json", copied / "eadp/index.json")
        edit(copied, "pub0", change)
        assert main([str(copied), "--only", "pub0"]) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (set_in("local_aggregation", "strategy", "top_k"), "top_k"),
        (set_in("selection", "K", 5), "not 5"),
        (lambda case: case.pop("T"), "no 'T'"),
        (lambda case: case["entropy_filter"].pop("T"), "no 'T'"),
    ],
)
def test_a_case_of_another_kind_is_refused(
    copied: Path,
    change: Callable[[dict[str, Any]], object],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    edit(copied, "pub0", change)
    assert main([str(copied), "--only", "pub0"]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


SCORES = {"importance_minmax", "importance_smoothed", "importance_final"}
CHOICE = {"select_idx", "index_mask"}


@pytest.mark.parametrize("case", CASES)
def test_positive_cosines_are_noticed(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = eadp.importance

    def flipped(patches: Tensor, *rest: Any, **named: Any) -> Tensor:
        return right(-patches, *rest, **named)

    monkeypatch.setattr(eadp, "importance", flipped)
    assert misses(case) >= {"global_sim", "local_sim_all", "text_sim"} | SCORES | CHOICE


@pytest.mark.parametrize("case", CASES)
def test_unsmoothed_importance_is_noticed(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eadp, "_grids", lambda tokens: None)
    wrong = {"smoothed", "importance_smoothed", "importance_final"}
    assert wrong <= misses(case) <= wrong | CHOICE


@pytest.mark.parametrize("case", CASES)
def test_similarity_of_the_wrong_features_is_noticed(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = eadp.similarity
    embeds = TENSORS[case]["image_embeds"]
    monkeypatch.setattr(eadp, "similarity", lambda features: right(embeds))
    assert misses(case) >= {"sim_matrix_rows"}


@pytest.mark.parametrize("case", CASES)
def test_the_most_important_are_not_the_choice(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def top(importance: Tensor, features: Tensor, keep: int) -> Tensor:
        return importance.topk(keep).indices

    monkeypatch.setattr(eadp, "select", top)
    assert misses(case) == CHOICE


@pytest.mark.parametrize("tokens", [50, 1152])
def test_other_numbers_of_tokens(copied: Path, tokens: int) -> None:
    """No square, and two tiles: recorded afresh, by the textbook, of two texts."""
    own = TENSORS["pub1"]
    generator = torch.Generator().manual_seed(tokens)
    embeds = torch.randn(2, tokens, 32, generator=generator)
    texts = torch.randn(2, 30, 32, generator=generator)
    whole = torch.randn(2, 32, generator=generator)

    def unit(value: Tensor) -> Tensor:
        return value / value.norm(dim=-1, keepdim=True)

    dense = -torch.einsum("bnc,mlc->bnml", unit(embeds), unit(texts))
    share = (100 * dense).softmax(dim=1)
    entropy = -(share * (share + 1e-12).log()).sum(dim=1)
    kept, index = entropy.topk(6, largest=False)
    filtered = dense.gather(-1, index[:, None].expand(-1, tokens, -1, -1))
    local = (filtered * (-kept / (0.01 + 1e-6)).softmax(dim=-1)[:, None]).sum(dim=-1)
    glob = -torch.einsum("bnc,mc->bnm", unit(embeds), unit(whole))
    text = (0.5 * glob + 0.5 * local).mean(dim=-1)
    low, high = text.amin(dim=1, keepdim=True), text.amax(dim=1, keepdim=True)
    minmax = smoothed = (text - low + 1e-6) / (high - low + 1e-6)
    if tokens % 576 == 0:
        smoothed = torch.cat([blurred(minmax[:, at : at + 576]) for at in range(0, tokens, 576)], 1)
    features = torch.randn(2, tokens, 32, generator=generator)
    similar = (unit(features) @ unit(features).mT + 1) / 2
    chosen = torch.stack([greedy(*pair, 9) for pair in zip(smoothed, similar, strict=True)])
    spoil(
        copied,
        "pub1",
        image_embeds=embeds,
        image_features=features,
        text_embeds=whole,
        text_embeds_seq=texts,
        global_sim=glob,
        local_sim_all=dense,
        text_entropy=entropy,
        kept_entropy=kept,
        kept_text_indices=index.int(),
        filtered_local_sim=filtered,
        local_sim=local,
        text_sim=text,
        importance_minmax=minmax,
        importance_smoothed=smoothed,
        importance_final=smoothed,
        sim_matrix_rows=similar[:, :8],
        select_idx=chosen.int(),
        index_mask=torch.zeros(2, tokens, dtype=torch.uint8).scatter_(1, chosen, 1),
    )
    facts = {"B": 2, "N": tokens, "M": 2, "T": 9, "smoothed": tokens % 576 == 0}
    edit(copied, "pub1", lambda case: case.update(facts))
    assert own.keys() == load_file(copied / "eadp/pub1.safetensors").keys()
    assert main([str(copied), "--only", "pub1"]) == 0


def blurred(values_BN: Tensor) -> Tensor:
    """By nine weighted shifts of the reflected 24 x 24 grid."""
    grid = torch.nn.functional.pad(values_BN.view(-1, 1, 24, 24), (1, 1, 1, 1), mode="reflect")
    shifts = [(row, column) for row in range(3) for column in range(3)]
    weights = torch.tensor([-((r - 1) ** 2 + (c - 1) ** 2) / 2 for r, c in shifts]).exp()
    parts = [grid[:, 0, row : row + 24, column : column + 24] for row, column in shifts]
    total = sum(weight * part for weight, part in zip(weights, parts, strict=True))
    return (torch.as_tensor(total) / weights.sum()).flatten(1)


def greedy(importance_N: Tensor, similar_NN: Tensor, keep: int) -> Tensor:
    best_N = torch.zeros_like(importance_N)
    chosen: list[int] = []
    for _ in range(keep):
        gain_N = ((similar_NN - best_N).clamp(min=0) * importance_N).sum(dim=1)
        gain_N[chosen] = -1
        chosen.append(int(gain_N.argmax()))
        best_N = torch.maximum(best_N, similar_NN[chosen[-1]])
    return torch.tensor(chosen)
