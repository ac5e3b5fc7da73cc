"""jobs/benchmark.py: what it says before it measures."""

import json
from dataclasses import replace
from pathlib import Path

import benchmark
import pytest
import torch
from PIL import Image
from transformers import LlamaConfig

from tests.tiny.llava import save_tiny_checkpoint
from trio.benchmark.shapes import sizes as shapes
from trio.benchmark.shapes.random_llava import LlavaShape
from trio.benchmark.shapes.random_onevision import ONEVISION_7B
from trio.benchmark.shapes.random_qwen import QWEN2_5_7B, QWEN3_8B
from trio.benchmark.shapes.sizes import blueprint
from trio.benchmark.speed import targets
from trio.engine.metrics import choosing_flops
from trio.families.registry import adapt
from trio.pruning.flops import DecoderShape
from trio.pruning.methods.divprune import DivPrune
from trio.pruning.methods.eadp import Eadp
from trio.pruning.methods.fastv import FastV
from trio.pruning.options import Pruning


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["quality", "--json", "{dir}/nowhere/x.json"], "no file can be written there"),
        (["quality", "--json", "{dir}"], "no file can be written there"),
        (["quality", "--methods", "fastest"], "--methods: method must be one of trio"),
        (["quality", "--encoders", "glasses"], "--encoders: unknown value 'glasses'"),
        (["speed", "--shape", "huge"], "--shape huge is not available"),
        (["speed", "--encoder", "scan"], "is not measured here"),
        (["likelihood", "--encoder", "scan"], "is not measured here"),
        (["speed", "--retention", "1/9", "--schedule", "1:9"], "not both"),
        (["speed", "--shape", "tiny", "--retention", "0.01"], "out of reach"),
        (["speed", "--device", "abacus"], "--device abacus is not to be had here; there is: cpu"),
        (["pipeline", "--model", "./nowhere"], "no model there"),
        (["targets", "--parts", "env,all"], "--parts all is not available; there are: env, "),
    ],
)
def test_mistakes_end_with_code_2_and_one_line(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark.main([flag.format(dir=tmp_path) for flag in flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("benchmark.py: ")


def test_speed_compares_four_ways_on_the_same_requests_and_beside_busy_loops(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "speed.json"
    flags = ["--shape", "tiny", "--batch", "3", "--prompt-tokens", "8", "--output-tokens", "2-4"]
    more = ["--rounds", "1", "--neighbours", "1", "--json", str(file)]
    assert benchmark.main(["speed", *flags, *more]) == 0
    told = json.loads(file.read_text())
    assert told["conditions"]["shape"] == "tiny" and "torch" in told["conditions"]
    generate, engine, pruned, patched = told["rows"]
    # 144 visual and 8 text tokens in 16 layers, 2 + 3 + 4 new ones; float32.
    token = 16 * 2 * 128 * 4
    assert engine["kv_bytes"] == token * (3 * 152 + 1 + 2 + 3)
    assert generate["kv_bytes"] == token * (3 * 152 + 3 * 3)
    assert pruned["flops"] == patched["flops"] < engine["flops"] == generate["flops"]
    assert told["kv_ratio"] == engine["kv_bytes"] / pruned["kv_bytes"] > 3
    assert 1 < told["flops_ratio_total"] < told["flops_ratio"]
    assert 0 < told["prune_share"] < 1
    assert engine["prune_share"] == 0 and generate["prune_share"] is None
    keys = ["prefill_speedup", "throughput_speedup", "engine_vs_generate", "pruned_vs_generate"]
    keys.append("prefill_vs_generate")
    assert all(low <= told[key] <= high for key, (low, high) in told["ranges"].items())
    assert next(iter(told)) == "conditions" and list(told)[1] == "prefill_vs_generate"
    assert all(told[key] > 0 for key in keys)
    printed = capsys.readouterr().out
    assert "patch + generate" in printed and "flops_ratio_total" in printed
    assert told["conditions"]["neighbours"] == 1 and "=" in told["conditions"]["waiting"]
    disturbed = told["neighbours"]
    names = [row["name"] for row in told["rows"]]
    assert disturbed["count"] == 1 and [row["name"] for row in disturbed["rows"]] == names
    assert disturbed["rows"][0]["total_s"] != told["rows"][0]["total_s"]
    idle, busy = told["rows"][2]["total_s"], disturbed["rows"][2]["total_s"]
    assert disturbed["images_left"]["engine trio"] == pytest.approx(idle / busy)
    assert "beside 1 busy loop\n" in printed and "engine trio: " in printed


@pytest.mark.slow
def test_likelihood_beside_answers_and_beside_a_prefill_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "likelihood.json"
    flags = ["--shape", "tiny", "--batch", "2", "--prompt-tokens", "8", "--rounds", "2"]
    more = ["--candidates", "3", "--candidate-tokens", "2", "--json", str(file)]
    assert benchmark.main(["likelihood", *flags, *more]) == 0
    told = json.loads(file.read_text())
    assert told["conditions"]["candidates"] == 3 and "torch" in told["conditions"]
    rows = {row["name"]: row["total_s"] for row in told["rows"]}
    assert len(rows) == 5 and all(seconds > 0 for seconds in rows.values())
    keys = ["yes_no_vs_2_tokens", "yes_no_vs_32_tokens", "one_prefill_vs_each"]
    assert list(told["ranges"]) == keys
    assert all(low <= told[key] <= high for key, (low, high) in told["ranges"].items())
    # Thirty steps more, and three prompts instead of one: that much shows on any machine.
    assert told["yes_no_vs_32_tokens"] > 1 and told["one_prefill_vs_each"] > 1
    assert "candidates, a prefill each" in capsys.readouterr().out


@pytest.mark.slow
def test_speed_of_llava_next_counts_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shape `tiny` with images of 5 tiles, 144 visual tokens each, and 24 newlines."""
    tiny = shapes.SHAPES["tiny"]
    assert isinstance(tiny, LlavaShape)
    grids = ((96, 192), (192, 96), (192, 192))
    monkeypatch.setitem(shapes.SHAPES, "next-tiny", replace(tiny, pinpoints=grids))
    told = {}
    for shape in ("tiny", "next-tiny"):
        file = tmp_path / f"{shape}.json"
        flags = ["--shape", shape, "--batch", "2", "--prompt-tokens", "8", "--output-tokens", "2"]
        assert benchmark.main(["speed", *flags, "--rounds", "1", "--json", str(file)]) == 0
        told[shape] = json.loads(file.read_text())
    generate, engine, pruned, patched = told["next-tiny"]["rows"]
    token = 16 * 2 * 128 * 4
    assert engine["kv_bytes"] == token * 2 * (5 * 144 + 24 + 8 + 1) == generate["kv_bytes"]
    assert pruned["flops"] == patched["flops"] < engine["flops"] == generate["flops"]
    assert pruned["kv_bytes"] == patched["kv_bytes"]
    encoder = [row["flops_total"] - row["flops"] for row in (engine, told["tiny"]["rows"][1])]
    assert encoder[0] == 5 * encoder[1] > 0


SIZES = {
    "llava-1.5-7b": (7_063_427_072, (336, 336), 576),
    "llava-next-7b": (7_063_431_168, (672, 672), 2928),
    "qwen2.5-vl-7b": (8_292_166_656, (1008, 1008), 1296),
    "qwen3-vl-8b": (8_767_123_696, (1024, 1024), 1024),
    "llava-onevision-7b": (8_029_890_080, (1152, 1393), 8765),
}
"""Parameters, and the largest or a usual image with its visual tokens."""


@pytest.mark.parametrize("name", shapes.PUBLISHED)
def test_the_published_sizes(name: str) -> None:
    parameters, size, tokens = SIZES[name]
    adapter = adapt(blueprint(name))
    assert sum(weight.numel() for weight in adapter.model.parameters()) == parameters
    assert adapter.largest_image == size and adapter.planned_visual_tokens == tokens
    (image,) = adapter.process_images(shapes.processor(name), [Image.new("RGB", size)])
    assert adapter.visual_tokens(image) == [tokens]


def test_speed_of_qwen2_5_vl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In miniature; its images of 288 x 288 pixels are scaled down to 12 x 12 visual tokens."""
    shape = replace(
        QWEN2_5_7B,
        hidden=64,
        intermediate=128,
        layers=12,
        heads=4,
        kv_heads=2,
        vocabulary=1000,
        positions=2048,
        sections=(2, 3, 3),
        patch=4,
        vision_hidden=24,
        vision_intermediate=40,
        vision_layers=4,
        vision_heads=2,
        window=32,
        whole=(1, 3),
        max_pixels=144 * 8**2,
    )
    monkeypatch.setitem(shapes.SHAPES, "qwen-tiny", shape)
    file = tmp_path / "speed.json"
    flags = ["--shape", "qwen-tiny", "--batch", "2", "--prompt-tokens", "8", "--output-tokens", "2"]
    assert benchmark.main(["speed", *flags, "--rounds", "1", "--json", str(file)]) == 0
    generate, engine, pruned, patched = json.loads(file.read_text())["rows"]
    # Keys and values of 2 heads of 16 in 12 layers, float32; one of two new tokens is stored.
    token = 12 * 2 * 2 * 16 * 4
    assert engine["kv_bytes"] == token * 2 * (144 + 8 + 1) == generate["kv_bytes"]
    assert pruned["flops"] == patched["flops"] < engine["flops"] == generate["flops"]
    assert pruned["kv_bytes"] == patched["kv_bytes"] < engine["kv_bytes"] / 3
    adapter = adapt(blueprint("qwen-tiny"))
    encoder = adapter.vision_flops({"image_grid_thw": torch.tensor([[1, 24, 24]])})
    assert engine["flops_total"] - engine["flops"] == 2 * encoder


TINY = {
    "qwen3": replace(
        QWEN3_8B,
        hidden=64,
        intermediate=96,
        layers=6,
        heads=4,
        kv_heads=2,
        head=16,
        vocabulary=1000,
        positions=2048,
        sections=(2, 3, 3),
        patch=4,
        vision_hidden=24,
        vision_intermediate=40,
        vision_layers=4,
        vision_heads=2,
        max_pixels=64 * 8**2,
        positions_learnt=64,
        deepstack=(1, 2),
    ),
    "onevision": replace(
        ONEVISION_7B,
        hidden=64,
        intermediate=96,
        layers=6,
        heads=4,
        kv_heads=2,
        vocabulary=1000,
        image=32,
        patch=8,
        vision_hidden=24,
        vision_intermediate=40,
        vision_layers=2,
        vision_heads=2,
        edge=2,
    ),
}


@pytest.mark.parametrize("name", [pytest.param("qwen3", marks=pytest.mark.slow), "onevision"])
def test_speed_of_other_families(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(shapes.SHAPES, name, TINY[name])
    file = tmp_path / "speed.json"
    flags = ["--shape", name, "--batch", "2", "--prompt-tokens", "8", "--output-tokens", "2"]
    more = ["--retention", "0.4", "--rounds", "1", "--json", str(file)]
    assert benchmark.main(["speed", *flags, *more]) == 0
    generate, engine, pruned, patched = json.loads(file.read_text())["rows"]
    assert pruned["flops"] == patched["flops"] < engine["flops"] == generate["flops"]
    assert pruned["kv_bytes"] == patched["kv_bytes"] < engine["kv_bytes"] == generate["kv_bytes"]


def test_cost_of_the_published_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of LLaVA-1.5-7B, whose published cache is 5.13 times smaller."""
    file = tmp_path / "cost.json"
    assert benchmark.main(["cost", "--shape", "llava-1.5-7b,tiny", "--json", str(file)]) == 0
    row, tiny = json.loads(file.read_text())["rows"]
    assert row["visual_tokens"] == 576 and row["stages"] == [[1, 92], [10, 54], [15, 22]]
    assert row["retention"] == pytest.approx(1 / 9)
    assert row["kv_cache"] == pytest.approx(5.129, abs=1e-3)
    ratios = [row[key] for key in ("decoder", "chosen", "whole")]
    assert ratios == pytest.approx((5.219, 4.969, 4.228), abs=5e-3)
    assert tiny["shape"] == "tiny" and tiny["whole"] < tiny["chosen"] < tiny["decoder"]
    printed = capsys.readouterr().out
    assert "1:92,10:54,15:22" in printed and "5.13" in printed
    fastv = ["--method", "fastv", "--schedule", "2:72"]
    assert benchmark.main(["cost", "--shape", "llava-1.5-7b", *fastv]) == 0
    printed = capsys.readouterr().out
    assert "method fastv" in printed and "2:72" in printed


def test_cost_of_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of its shape alone: its weights may be damaged."""
    model = save_tiny_checkpoint(tmp_path / "model")
    (model / "model.safetensors").write_bytes(b"")
    file = tmp_path / "cost.json"
    flags = ["--retention", "0.4", "--image", "90x20", "--json", str(file)]
    assert benchmark.main(["cost", "--model", str(model), *flags]) == 0
    (row,) = json.loads(file.read_text())["rows"]
    assert row["visual_tokens"] == 64 and row["shape"] == str(model)
    assert benchmark.main(["cost", "--model", str(tmp_path), *flags]) == 2
    assert "no config.json" in capsys.readouterr().err
    assert benchmark.main(["cost", "--model", str(model), "--shape", "tiny"]) == 2
    assert "exclude each other" in capsys.readouterr().err


def test_cost_where_nothing_goes() -> None:
    """Then nothing is scored either."""
    shape, everything = DecoderShape.of_config(LlamaConfig()), Pruning(schedule="1:576,3:576")
    assert choosing_flops(shape, everything, (576,), 60) == 0
    halves = [
        choosing_flops(shape, Pruning(schedule="1:288,3:288", method=method), (576,), 60)
        for method in ("trio", "gradient", "random", "fastv")
    ]
    assert halves[3] == FastV().flops(shape, 636, [])
    for own in (DivPrune(), Eadp()):
        once = Pruning(schedule="0:64", method=own.name)
        assert choosing_flops(shape, once, (576,), 60) == own.flops(shape, 636, [(576, 64)]) > 0
    assert halves[0] - halves[1] == 2 * 576 * 288 * 4096
    assert halves[2] == 0


def test_choosing_among_several_images_compares_within_each() -> None:
    """The proxy sees all tokens; an image of which all stay is not compared."""
    shape, pruning = DecoderShape.of_config(LlamaConfig()), Pruning(schedule="1:100,3:50")
    first, second = (shape.proxy_flops(tokens, 4) for tokens in (576 + 80 + 60, 100 + 80 + 60))
    compared = (576 * 576 + 100 * 100 + 80 * 100) * 4096
    assert choosing_flops(shape, pruning, (576, 80), 60) == first + second + compared
    for own in (DivPrune(), Eadp()):
        once = Pruning(schedule="0:64", method=own.name)
        expected = own.flops(shape, 780, [(576, 64), (80, 64)])
        assert choosing_flops(shape, once, (576, 80, 64), 60) == expected
    assert choosing_flops(shape, pruning, (), 60) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shape", "huge"], "--shape huge is not available"),
        (["--retention", "1"], "prune nothing"),
        (["--method", "eadp"], "is not counted"),
        (["--retention", "0.001"], "smallest retention"),
        (["--image", "2000x2"], "at most 200 times"),
        (["--image", "99999x99999"], "100000000 pixels"),
        (["--schedule", "40:3"], "32 layers"),
    ],
)
def test_cost_that_cannot_be_told(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark.main(["cost", "--shape", "llava-1.5-7b", *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_dry_run_of_pipeline_starts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["pipeline", "--rows", "7", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "rows 7" in printed and "image_size 64" in printed and printed.count("\n") == 1


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
def test_pipeline_runs_job_engine_and_instant_engine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "pipeline.json"
    flags = ["--rows", "3", "--instant-rows", "41", "--image-size", "16", "--rounds", "1"]
    assert benchmark.main(["pipeline", *flags, "--json", str(file)]) == 0
    told = json.loads(file.read_text())
    assert told["conditions"]["image_size"] == 16 and "ray" in told["conditions"]
    job, *alone, prepared, instant = told["rows"]
    assert (job["name"], instant["name"]) == ("job", "job, instant engine")
    assert [row["rows"] for row in (job, *alone, prepared)] == [3] * (len(alone) + 2)
    assert instant["rows"] == 41
    assert told["pipeline_rows_per_s"] == instant["rows_per_s"]
    fastest = max(row["rows_per_s"] for row in alone)
    assert told["job_vs_engine"] == pytest.approx(job["rows_per_s"] / fastest)
    assert told["job_vs_engine_range"] == [told["job_vs_engine"]] * 2
    assert "pipeline_rows_per_s" in capsys.readouterr().out


def test_pipeline_takes_medians_of_ratios_within_rounds() -> None:
    """A round in which the whole machine is slow has the same ratio as the others."""
    from trio.benchmark.speed.job_speed import INSTANT, JOB, PREPARED, Run, engine_name, summary

    def runs(slow: float, second_thread: float) -> dict[str, Run]:
        return {
            JOB: Run(rows=80, work_s=4.0 * slow, start_s=1.0),
            engine_name(1): Run(rows=80, work_s=8.0 * slow),
            engine_name(2): Run(rows=80, work_s=8.0 * slow / second_thread),
            PREPARED: Run(rows=80, work_s=2.0 * slow),
            INSTANT: Run(rows=300, work_s=slow, start_s=2.0),
        }

    told = summary([runs(1, 4), runs(3, 4), runs(5, 0.5)])
    assert told["job_vs_engine"] == 0.5 and told["job_vs_engine_range"] == (0.5, 2.0)
    assert told["job_vs_prepared"] == 0.5
    assert told["pipeline_rows_per_s"] == 100 and told["pipeline_rows_per_s_range"] == (60, 300)
    assert told["rows"][0]["start_s"] == 1.0 and told["rows"][1]["start_s"] is None


def test_a_dry_run_lists_what_would_be_measured(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--methods", "none,random,trio", "--retention", "1/3,1/9"]
    several = ["--proxy-positions", "with_last,last", "--position-ids", "keep,renumber"]
    assert benchmark.main(["quality", *flags, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "none, retention 1" and len(lines) == 2 + 2 * 3
    assert lines[-2:] == ["trio, retention 0.1111", "trio as published, retention 0.1111"]
    assert benchmark.main(["quality", *flags, *several, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 2 * (2 + 4 + 1)
    assert lines[-2] == "trio last renumber, retention 0.1111"


def test_targets_are_read_off_their_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert benchmark.main(["targets", "--dry-run"]) == 0
    assert "small, batch 16, 8 to 128 output tokens" in capsys.readouterr().out
    never = targets.Target(name="kv_ratio", figure=lambda found: found["kv_ratio"], goal=1e9)
    runs = [
        replace(run, shape="tiny", batch=2, output_tokens=(2, 3), targets=(*run.targets, never))
        for run in targets.RUNS["cuda"][:1]
    ]
    monkeypatch.setitem(targets.RUNS, "cpu", tuple(runs))
    file = tmp_path / "x.json"
    command = ["targets", "--parts", "goals", "--device", "cpu", "--rounds", "1"]
    command += ["--json", str(file)]
    assert benchmark.main(command) == 0
    found = json.loads(file.read_text())
    (name,) = found["runs"]
    result = found["runs"][name]
    by_figure = {row["figure"]: row for row in found["targets"]}
    assert by_figure["prefill_speedup"]["value"] == result["prefill_speedup"]
    (engine,) = (row for row in result["rows"] if row["name"] == "engine")
    own = by_figure["prefill_utilisation, engine"]
    assert own["value"] == engine["prefill_utilisation"]
    assert own["met"] == (own["value"] >= 0.55)
    assert by_figure["kv_ratio"]["met"] is False
    assert "missed" in capsys.readouterr().out


def test_a_target_may_be_an_upper_bound() -> None:
    share = targets.Target(name="x", figure=lambda found: found["x"], goal=0.1, at_most=True)
    assert share.row("a", {"x": 0.1})["met"] and not share.row("a", {"x": 0.11})["met"]
