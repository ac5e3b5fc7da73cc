"""jobs/benchmark.py quality: what it reports, on a few scenes of the bundled model."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import benchmark
import pytest
import torch

from tests.tiny.llava import save_tiny_checkpoint, tiny_llava
from trio.benchmark.progress_line import Clock
from trio.benchmark.quality import plots
from trio.benchmark.quality.comparison import Setting, ask, in_reach, settings
from trio.benchmark.quality.fill_up import survivors
from trio.benchmark.quality.quality_table import _relative
from trio.families.registry import adapt
from trio.pruning.method_registry import method_names as methods
from trio.pruning.options import Pruning
from trio.pruning.selection.nms import suppress_and_fill_up
from trio.vqa.intervals import wilson_interval

FLAGS = ["--methods", "none,random,trio", "--retention", "1/9,1/18", "--scenes", "1"]
FLAGS += ["--proxy-layer", "previous"]
PARTS = ("all", "questions", "captions")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("quality") / "quality.json"
    assert benchmark.main(["quality", *FLAGS, "--seed", "11,12", "--json", str(file)]) == 0
    return file


@pytest.fixture(scope="module")
def told(written: Path) -> Any:
    return json.loads(written.read_text())


def test_conditions_and_what_is_out_of_reach(told: Any) -> None:
    conditions = told["conditions"]
    assert conditions["seeds"] == [11, 12] and conditions["settings"] == len(told["rows"]) == 6
    assert "torch" in conditions
    (left_out,) = told["left_out"]
    assert (left_out["label"], left_out["retention"]) == ("trio", pytest.approx(1 / 18))
    assert "none has at layer 0" in left_out["reason"]
    further = [row["label"] for row in told["rows"] if row["retention"] < 1 / 9]
    assert further == ["random", "trio as published from layer 0"]


def test_the_unpruned_model_agrees_with_itself(told: Any) -> None:
    row = told["rows"][0]
    assert (row["label"], row["number"], row["retention_measured"]) == ("none", 0, 1.0)
    for part in PARTS:
        assert row[part]["relative"] == 1.0 and row[part]["relative_interval"] == [1.0, 1.0]
    assert row["agreement"] == {"exact": 1.0, "overlap": 1.0, "kl": 0.0}
    assert row["flops"]["ratio"] == row["flops"]["ratio_decoder"] == 1.0
    assert row["flops"]["choosing"] == 0 and row["own_time_share"] == 0.0


def test_what_a_pruned_setting_reports(told: Any) -> None:
    unpruned, *rows = told["rows"]
    pruned = [row for row in rows if row["retention"] == pytest.approx(1 / 9)]
    assert [row["label"] for row in pruned] == ["random", "trio", "trio as published"]
    for row in pruned:
        assert row["retention_measured"] == pytest.approx(1 / 9, abs=1e-3)
        assert [row[part]["n"] for part in PARTS] == [4, 2, 2]
        assert row["agreement"]["kl"] > 0 and 0 <= row["agreement"]["overlap"] <= 1
        low, high = row["all"]["relative_interval"]
        assert low <= row["all"]["relative"] <= high
        flops, ms = row["flops"], row["ms"]
        assert flops["total"] == flops["decoder"] + flops["encoder"] + flops["choosing"]
        assert flops["ratio"] == pytest.approx(unpruned["flops"]["total"] / flops["total"])
        assert 1 < flops["ratio"] < flops["ratio_decoder"]
        assert ms["image"] == pytest.approx(ms["encode"] + ms["prefill"] + ms["decode"])
        # All settings without a reduction in the encoder read the same features.
        assert ms["encode"] == unpruned["ms"]["encode"] > 0
        share = ms["prune"] / (ms["encode"] + ms["prefill"])
        assert row["own_time_share"] == pytest.approx(share)
    random, trio, published = pruned
    assert random["flops"]["choosing"] == 0 < trio["flops"]["choosing"]
    assert random["proxy_positions"] is None and random["fill_up"] is None
    assert (trio["proxy_positions"], trio["fill_up"]) == ("with_last", "mixed")
    assert (published["proxy_positions"], published["fill_up"]) == ("reference", "reference")


def test_a_file_is_shown_again(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["quality", "--from", str(written)]) == 0
    head, unpruned, gap, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["setting", "kept", "all"] and not gap
    assert unpruned.split()[:2] == ["none", "1"] and lines[0].split()[:2] == ["random", "1/9"]
    assert any("1:58, 5:35, 8:14" in line and "2 of 2 [34.2, 100.0]" in line for line in lines)
    assert benchmark.main(["quality", "--from", str(written), "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("|---|") and lines[2].startswith("| none | 1 |")
    assert len({line.count("|") for line in lines[:5]}) == 1


def test_the_plot_is_written(written: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="is in the extra `test`")
    file = tmp_path / "quality.png"
    assert benchmark.main(["quality", "--from", str(written), "--plot", str(file)]) == 0
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--plot", "{dir}/x.png"], "pip install 'trio-vlm[plot]'"),
        (["--from", "{dir}/x.json"], "No such file"),
        (["--from", __file__], "--from"),
        (["--seed", "3,3"], "come once"),
        (["--seed", "3,x"], "expected a whole number"),
        (["--methods", "eadp", "--encoders", "scan", "--model", "{dir}/model"], "--text-tower"),
        (["--methods", "eadp", "--model", "{dir}/model"], "method eadp needs --text-tower"),
    ],
)
def test_mistakes_before_anything_is_measured(
    flags: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save_tiny_checkpoint(tmp_path / "model")
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    assert benchmark.main(["quality", *(flag.format(dir=tmp_path) for flag in flags)]) == 2
    assert message in capsys.readouterr().err


def test_a_plot_is_a_png(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "find_spec", lambda name: object())
    assert benchmark.main(["quality", "--plot", str(tmp_path)]) == 2
    assert "name a .png file" in capsys.readouterr().err


def test_settings_are_all_combinations() -> None:
    encoders = ("none", "visionzip", "scan")
    retentions = (1 / 3, 2 / 9, 1 / 9, 1 / 18)
    proxy = {"proxy_positions": "with_last"}
    rows = settings(methods(), retentions, encoders, [proxy], ["renumber"], 11)
    published = [row.pruning for row in rows if row.label.endswith("as published")]
    assert [(own.encoder, own.retention) for own in published if own.encoder != "none"] == [
        ("visionzip", 1 / 9),
        ("scan", 1 / 9),
    ]
    assert len(published) == 4 + 2
    names = {(row.label, row.pruning.retention) for row in rows}
    assert len(rows) == 1 + 4 * (len(methods()) * 3 - 1) + len(published) == len(names)
    by_label = {row.label: row.pruning for row in rows}
    assert by_label["visionzip"].method == "none"
    expected = Pruning(
        method="trio",
        encoder="scan",
        retention=1 / 18,
        proxy_positions="with_last",
        position_ids="renumber",
        seed=11,
    )
    assert by_label["scan + trio"] == expected


def test_a_setting_that_comes_to_the_same_as_another_is_named() -> None:
    pruning = Pruning(retention=0.5)
    rows = [
        Setting(label="none", pruning=Pruning()),
        Setting(label="open", pruning=pruning),
        Setting(label="given", pruning=replace(pruning, fill_up="mixed")),
    ]
    there, left_out = in_reach(adapt(tiny_llava(layers=8)), rows, has_text_tower=False)
    assert there == rows[:2]
    assert left_out == [{"label": "given", "retention": 0.5, "reason": "same as open"}]


def test_a_bootstrap_without_width_gives_way_to_wilson() -> None:
    scene: dict[str, Any] = {"relative": 1.0, "right_unpruned": 9, "still_right": 9}
    scene["still_right_interval"] = wilson_interval(9, 9)
    assert _relative(scene | {"relative_interval": [1.0, 1.0]}) == "9 of 9 [70.1, 100.0]"
    assert _relative(scene | {"relative_interval": [0.9, 1.0]}) == "100.0 [90.0, 100.0]"


def test_scenes_of_several_seeds_are_pooled() -> None:
    both, second = ask(2, [3, 4]), ask(2, [4])
    assert [one.scene for one in both] == [0, 0, 1, 2, 2, 3]
    assert [one.kind == "caption" for one in both] == [True, False, True] * 2
    assert [one.request.id for one in both] == list(range(6))
    assert [one.answer for one in both[3:]] == [one.answer for one in second]


def test_the_clock_says_how_long_it_may_take() -> None:
    clock = Clock(3)
    first, second, last = (clock.lap() for _ in range(3))
    assert first == "1/3 after 0:00:00" and last == "3/3 after 0:00:00"
    assert second == "2/3 after 0:00:00, about 0:00:00 to go"


def test_two_schedules_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A question of every scene, both first stages at one retention and one of them below."""
    file = tmp_path / "quality.json"
    flags = ["--methods", "trio", "--retention", "1/9,1/18", "--schedule-shape", "start", "family"]
    flags += ["--scenes", "2", "--every-scene", "--seed", "13", "--json", str(file)]
    assert benchmark.main(["quality", *flags]) == 0
    told = json.loads(file.read_text())
    (same,) = told["left_out"]
    assert (same["label"], same["reason"]) == ("trio family", "same as trio from layer 0")
    assert same["retention"] == pytest.approx(1 / 18)
    unpruned, *rows = told["rows"]
    assert [unpruned[part]["n"] for part in PARTS] == [4, 2, 2]
    assert [(row["label"], row["schedule"]) for row in rows] == [
        ("trio from layer 0", "0:118,5:69,8:28"),
        ("trio family", "1:58,5:35,8:14"),
        ("trio from layer 0", "0:59,5:35,8:14"),
    ]
    for row in rows:
        filled = row["fill_up_share"]
        kept = [int(stage.split(":")[1]) for stage in row["schedule"].split(",")]
        pairs = zip(filled["suppressed_to"], filled["filled_up"], strict=True)
        assert [unlike + more for unlike, more in pairs] == pytest.approx(kept)
        assert filled["requests"] == 4 and 1 <= filled["suppressed_to"][0] < kept[0]
        both, of = row["questions"]["still_right"], row["questions"]["right_unpruned"]
        low, high = row["questions"]["still_right_interval"]
        assert low <= both / of <= high and low < high
    assert f"{both} of {of} [" in capsys.readouterr().out


def test_what_the_suppression_left_is_told_from_what_filled_up() -> None:
    """Of what is kept, what would be without a fill-up, told by the kept alone."""
    torch.manual_seed(2)
    features = torch.randn(60, 6)
    order = torch.randperm(60)
    walked: list[int] = []
    unit = torch.nn.functional.normalize(features, dim=-1)
    for place in order.tolist():
        if not (unit[walked] @ unit[place] >= 0.5).any():
            walked.append(place)
    keep = len(walked) + 7
    count_N, keep_N = torch.tensor([[60], [keep]])
    (kept,) = suppress_and_fill_up(
        features,
        torch.zeros(60, 2),
        torch.arange(60)[None],
        count_N,
        keep_N,
        order[None],
        keep,
        0.5,
        "mixed",
    ).tolist()
    ranked = [place for place in order.tolist() if place in kept]
    assert len(kept) == keep and survivors(features[ranked], 0.5) == len(walked)
