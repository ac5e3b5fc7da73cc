"""The replay of the Qwen2.5-VL cases: how far it goes, and what it notices."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from trio.conformance import trio_qwen
from trio.conformance.__main__ import main
from trio.conformance.files import read_cases
from trio.pruning import reference

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
INDEX = json.loads((GOLDEN / "trio_qwen/index.json").read_text())
CASES = {case["name"]: case for case in INDEX["cases"]}
TENSORS = {name: sorted(load_file(GOLDEN / f"trio_qwen/{name}.safetensors")) for name in CASES}
LIMIT = "without a causal mask"
LAYERS = 8


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the recorded cases, to be spoilt."""
    shutil.copytree(GOLDEN / "trio_qwen", tmp_path / "trio_qwen")
    return tmp_path


def compared(case: str, tensor: str) -> bool:
    """With a cache nothing that depends on values is, once a layer has run behind a selection."""
    behind = tensor.startswith(("stage1.", "final_", "last_"))
    return not (CASES[case]["use_cache"] and behind)


def spoil(folder: Path, case: str, tensor: str) -> None:
    path = folder / f"trio_qwen/{case}.safetensors"
    tensors = load_file(path)
    flat = tensors[tensor].view(-1)
    flat[0] += 1e-3 if flat.is_floating_point() else 1
    save_file(tensors, path)


def edit(folder: Path, case: str, change: Callable[[dict[str, Any]], object]) -> None:
    index = folder / "trio_qwen/index.json"
    content = json.loads(index.read_text())
    change(next(own for own in content["cases"] if own["name"] == case))
    index.write_text(json.dumps(content))


@pytest.mark.parametrize("case", CASES)
def test_every_recorded_case_passes(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(GOLDEN), "--only", f"trio_qwen/{case}"]) == 0
    out = capsys.readouterr().out
    assert f"trio_qwen/{case}: ok" in out and "1 of 1 cases passed" in out
    assert (LIMIT in out) == ("compared only so far" in out) == CASES[case]["use_cache"]


SPOILT = [(case, tensor) for case, tensors in TENSORS.items() for tensor in tensors]


@pytest.mark.parametrize(("case", "tensor"), SPOILT)
def test_a_spoilt_tensor_is_noticed_where_it_can_be(copied: Path, case: str, tensor: str) -> None:
    spoil(copied, case, tensor)
    assert main([str(copied), "--only", case]) == (1 if compared(case, tensor) else 0)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("proxy_layer", "next"),
        ("proxy_head", "output"),
        ("proxy_positions", "with_last"),
        ("position_ids", "renumber"),
        ("similarity_threshold", 0.7),
    ],
)
def test_another_way_of_pruning_does_not_pass(
    setting: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(trio_qwen.REFERENCE, setting, value)
    assert main([str(GOLDEN), "--only", "trio_qwen/pub0"]) == 1


@pytest.mark.parametrize("case", ["pub0", "pub1"])
@pytest.mark.parametrize(
    ("fact", "value"),
    [
        ("image_token_ratio_list", [0.5, 0.4]),
        ("layer_list", [1, 5]),
        ("layer_list", [1, 8]),
        ("image_start_index", 6),
        ("n_image_tokens", 63),
        ("seq_len", 90),
        ("grid_h", 7),
        ("causal_after_pruning", None),
        ("masked_entries_in_rebuilt_masks", None),
    ],
)
def test_other_facts_do_not_pass(copied: Path, case: str, fact: str, value: object) -> None:
    flipped = {
        "causal_after_pruning": not CASES[case]["causal_after_pruning"],
        "masked_entries_in_rebuilt_masks": [None, None] if case == "pub1" else [None, 0],
    }
    edit(copied, case, lambda own: own.update({fact: flipped.get(fact, value)}))
    assert main([str(copied), "--only", case]) == 1


def test_other_cache_lengths_do_not_pass(copied: Path) -> None:
    edit(copied, "pub1", lambda own: own["kv_lens"].append(35))
    assert main([str(copied), "--only", "pub1"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("case", "number"), [("pub0", 0), ("pub1", 1)])
@pytest.mark.parametrize(
    "fact",
    [
        "rank_layer",
        "proxy_layer",
        "seq_in",
        "seq_out",
        "visual_in",
        "visual_out",
        "loss",
        "first_pass_picks",
        "second_pass_picks",
        "differs_from_plain_topk_in",
    ],
)
def test_other_facts_of_a_stage_do_not_pass(
    copied: Path, case: str, number: int, fact: str
) -> None:
    edit(copied, case, lambda own: own["stages"][number].update({fact: 99}))
    by_values = fact in ("loss", "first_pass_picks", "second_pass_picks")
    by_values |= fact == "differs_from_plain_topk_in"
    noticed = not (by_values and (case, number) == ("pub1", 1))
    assert main([str(copied), "--only", case]) == noticed


@pytest.mark.parametrize(
    "fact",
    [
        "file",
        "model",
        "layer_list",
        "image_token_ratio_list",
        "stages",
        "use_cache",
        "causal_after_pruning",
        "masked_entries_in_rebuilt_masks",
        "n_image_tokens",
        "image_start_index",
        "seq_len",
        "grid_w",
        "kv_lens",
    ],
)
def test_a_missing_fact(copied: Path, fact: str, capsys: pytest.CaptureFixture[str]) -> None:
    edit(copied, "pub1", lambda own: own.pop(fact))
    assert f"no '{fact}'" in complaint(copied, "pub1", capsys)


@pytest.mark.parametrize("fact", ["stage", "rank_layer", "visual_out", "proxy_layer", "loss"])
def test_a_missing_fact_of_a_stage(
    copied: Path, fact: str, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(copied, "pub1", lambda own: own["stages"][0].pop(fact))
    assert f"no '{fact}'" in complaint(copied, "pub1", capsys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_start_index": 80}, "no image at 80..144 among 89 tokens"),
        ({"layer_list": [1]}, "must be as long as layer_list"),
        ({"layer_list": [1, 9]}, "last possible stage is at 8"),
        ({"layer_list": [0, 4]}, "begin at layer 1"),
    ],
)
def test_facts_that_cannot_be_run(
    copied: Path, change: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(copied, "pub0", lambda own: own.update(change))
    assert message in complaint(copied, "pub0", capsys)


@pytest.mark.parametrize("tensor", ["position_ids", "stage0.loss", "stage0.order_0", "last_logits"])
def test_a_missing_tensor(copied: Path, tensor: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = copied / "trio_qwen/pub0.safetensors"
    tensors = load_file(path)
    del tensors[tensor]
    save_file(tensors, path)
    assert f"'{tensor}' is missing" in complaint(copied, "pub0", capsys)


def test_positions_of_one_axis_are_refused(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied / "trio_qwen/pub0.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "position_ids": tensors["position_ids"][0].clone()}, path)
    assert "position_ids [3, 1, 89]" in complaint(copied, "pub0", capsys)


@pytest.mark.parametrize("weight", ["lm_head.weight", "model.layers.3.self_attn.k_proj.bias"])
def test_weights_that_do_not_fit(
    copied: Path, weight: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied / "trio_qwen/model_a.safetensors"
    weights = load_file(path)
    whole = weights.pop(weight)
    save_file(weights, path)
    assert weight in complaint(copied, "pub0", capsys)
    save_file({**weights, weight: whole[:3].clone()}, path)
    assert "does not fit" in complaint(copied, "pub0", capsys)


def complaint(folder: Path, case: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main([str(folder), "--only", case]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


class Book:
    """Records a case as the textbook has it: pub0's prompt and model, other stages.

    Causal throughout, so what it says of a cached run is right up to the first selection.
    """

    def __init__(self, folder: Path, layers: list[int], ratios: list[float], cached: bool) -> None:
        self.folder = folder / "trio_qwen"
        (case,) = (one for one in read_cases(self.folder) if one.name == "pub0")
        self.decoder = trio_qwen._decoder(case)
        self.text = copy.deepcopy(self.decoder.model)
        self.text.config._attn_implementation = "eager"
        old = load_file(self.folder / "pub0.safetensors")
        kept = ("inputs_embeds", "position_ids", "text_ids_0")
        self.tensors = {name: old[name] for name in kept}
        self.stages: list[dict[str, Any]] = []
        self.facts: dict[str, Any] = {
            **CASES["pub0"],
            "layer_list": layers,
            "image_token_ratio_list": ratios,
            "use_cache": cached,
            "stages": self.stages,
        }

    def write(self) -> None:
        hidden, positions = self.tensors["inputs_embeds"][0], self.tensors["position_ids"][:, 0]
        ratios = dict(
            zip(self.facts["layer_list"], self.facts["image_token_ratio_list"], strict=True)
        )
        visual, lengths = self.facts["n_image_tokens"], []
        for layer in range(LAYERS + 1):
            if layer in ratios:
                keep = int(ratios[layer] * visual)
                hidden, positions = self._stage(layer, hidden, positions, visual, keep)
                visual = keep or visual
            if layer < LAYERS:
                lengths.append(len(hidden))
                with torch.no_grad():
                    hidden = reference.run_layer(self.text, layer, hidden, positions)
        with torch.no_grad():
            final = self.text.norm(hidden)
            logits = self.decoder.lm_head(final[-1:])
        self.tensors |= {
            "final_hidden": final[None],
            "last_hidden": final[-1:].clone(),
            "last_logits": logits,
            "kv_lens": torch.tensor(lengths),
        }
        self.facts["kv_lens"] = lengths
        causal = not self.facts["use_cache"]
        masks = [None, *([None if causal else 0] * len(ratios))]
        self.facts |= {"causal_after_pruning": causal, "masked_entries_in_rebuilt_masks": masks}
        save_file(
            {name: own.clone().contiguous() for name, own in self.tensors.items()},
            self.folder / "pub0.safetensors",
        )
        edit(self.folder.parent, "pub0", lambda own: own.update(self.facts))

    def _stage(
        self, layer: int, hidden: Tensor, positions: Tensor, visual: int, keep: int
    ) -> tuple[Tensor, Tensor]:
        number, start = len(self.stages), self.facts["image_start_index"]
        own: dict[str, Tensor] = {
            "features_in": hidden[None],
            "position_ids_in": positions[:, None],
        }
        facts: dict[str, Any] = {"stage": number, "rank_layer": layer}
        facts |= {"seq_in": len(hidden), "visual_in": visual}
        stays = torch.ones(len(hidden), dtype=torch.bool)
        if keep:
            head = reference.embedding_head(self.text)
            scores, loss = reference.saliency(
                self.text, head, layer - 1, hidden, positions, "reference"
            )
            features = hidden[start : start + visual]
            order = reference.order(scores[start : start + visual])
            kept = reference.walk(features, order, keep, 0.8)
            stays[start : start + visual] = False
            stays[start + torch.tensor(kept)] = True
            own |= {
                "loss": loss[None],
                "grad_norm_all": scores[None],
                "scores_0": scores[start : start + visual],
                "order_0": torch.tensor(order),
                "selected_0": torch.tensor(kept),
            }
            strict = strict_picks(features, [token for token in order if token in kept])
            facts |= {
                "proxy_layer": layer - 1,
                "loss": float(loss),
                "first_pass_picks": strict,
                "second_pass_picks": keep - strict,
                "differs_from_plain_topk_in": len(set(kept) - set(order[:keep])),
            }
        else:
            facts["pruned"] = False
        hidden, positions = hidden[stays], positions[:, stays]
        own |= {"features_out": hidden[None], "position_ids_out": positions[:, None]}
        facts |= {"seq_out": len(hidden), "visual_out": keep or visual}
        self.stages.append(facts)
        self.tensors |= {f"stage{number}.{name}": tensor for name, tensor in own.items()}
        return hidden, positions


def strict_picks(features: Tensor, ranked: list[int]) -> int:
    taken: list[int] = []
    for token in ranked:
        alike = (float(F.cosine_similarity(features[token], features[t], dim=0)) for t in taken)
        if not any(cosine >= 0.8 for cosine in alike):
            taken.append(token)
    return len(taken)


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True], ids=["no cache", "cached"])
@pytest.mark.parametrize(
    ("layers", "ratios", "last"),
    [
        ([1, 3, 5], [0.01, 0.5, 0.3], 1),
        ([2, 8], [0.4, 0.4], 0),
        ([8], [0.4], 0),
        ([3, 8], [0.01, 0.3], 1),
        ([4, 6], [0.01, 0.01], 1),
        ([2, 6], [1.0, 0.3], 0),
    ],
    ids=str,
)
def test_stages_that_no_case_here_has(
    copied: Path,
    layers: list[int],
    ratios: list[float],
    last: int,
    cached: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Such that remove nothing, and such behind the last layer; `last`: the stage up to which a
    cached one is compared."""
    Book(copied, layers, ratios, cached).write()
    assert main([str(copied), "--only", "pub0"]) == 0
    whole = not cached or layers[last] == LAYERS or ratios[last] == 0.01
    assert (LIMIT in capsys.readouterr().out) == (not whole)
    for number in range(len(layers)):
        spoilt = copied.parent / f"{copied.name}-{number}"
        shutil.copytree(copied, spoilt)
        spoil(spoilt, "pub0", f"stage{number}.features_out")
        assert main([str(spoilt), "--only", "pub0"]) == (whole or number <= last)
    spoil(copied, "pub0", "final_hidden")
    assert main([str(copied), "--only", "pub0"]) == whole


def test_a_stage_that_removes_nothing_need_not_be_recorded(copied: Path) -> None:
    book = Book(copied, [1, 3], [0.01, 0.5], cached=True)
    book.write()
    edit(copied, "pub0", lambda own: own.update(stages=own["stages"][1:]))
    assert main([str(copied), "--only", "pub0"]) == 0
    spoil(copied, "pub0", "stage1.features_in")
    assert main([str(copied), "--only", "pub0"]) == 1
    edit(copied, "pub0", lambda own: own.update(stages=[]))
    assert main([str(copied), "--only", "pub0"]) == 1
