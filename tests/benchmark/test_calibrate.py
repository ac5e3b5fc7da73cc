"""jobs/benchmark.py calibrate: candidates, search, file, and the jobs that take it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import benchmark
import caption
import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from torch import Tensor

from tests.engine.support import by_id, lively_llava, mixed_requests
from tests.job.fakes import encoded, write_shard
from tests.test_caption_job import picture
from tests.tiny.llava import save_tiny_checkpoint, tiny_processor
from trio.benchmark.quality.calibrate import Calibration, Comparison, Plan, divergence
from trio.benchmark.quality.sample import drawn
from trio.benchmark.quality.search import COARSE, FINE, Search, Space, most_answers, rungs
from trio.engine.decoding.teacher_forcing import Answer, Answers
from trio.engine.engine import Engine
from trio.engine.loading import load
from trio.engine.preprocess import Preprocessor
from trio.engine.request import Prepared, Sampling
from trio.errors import UserError
from trio.families.registry import adapt
from trio.job import cli, run_yaml
from trio.job.command import main
from trio.job.input.manifest import Manifest, Shard
from trio.job.settings import made_of
from trio.pruning.options import Pruning
from trio.pruning.pruning_config import FILE
from trio.pruning.schedule import LLAVA, Schedule, tokens_per_layer

PROMPT = "what is in the picture ?"


def space(layers: int = 32, retention: float = 1 / 9, **settings: Any) -> Space:
    default = Schedule.of_shares(retention, layers, LLAVA.at_depth(layers))
    settings.setdefault("allowed", lambda schedule: True)
    return Space(default=default, retention=retention, num_layers=layers, **settings)


def everything(found: Space) -> list[Schedule]:
    grid = found.grid()
    changed = [one for each in [found.default, *grid] for one in found.around(each, (1 / 8, 1.6))]
    return [found.default, *grid, *changed]


@pytest.mark.parametrize(("layers", "retention"), [(4, 0.7), (6, 1 / 3), (32, 1 / 9), (80, 1 / 9)])
def test_all_candidates_keep_the_same_layer_average(layers: int, retention: float) -> None:
    found = everything(space(layers, retention))
    assert len(found) > 20
    for schedule in found:
        schedule.check_depth(layers)
        for visual in (144, 576, 2880):
            present = tokens_per_layer(visual, schedule.counts(visual), layers)
            assert abs(sum(present) / layers - retention * visual) <= 1.0


def test_the_grid_has_several_beginnings_numbers_of_stages_and_slopes() -> None:
    grid = space().grid()
    assert {schedule.layers[0] for schedule in grid} == {0, 1, 2, 3}
    assert {len(schedule.stages) for schedule in grid} == {1, 2, 3}
    assert space().default not in grid and len(set(grid)) == len(grid)


def test_what_costs_more_is_no_candidate() -> None:
    few = space(allowed=lambda schedule: len(schedule.stages) == 1)
    assert {len(schedule.stages) for schedule in everything(few)[1:]} == {1}


def test_after_an_encoder_the_first_stage_stays_at_0() -> None:
    default = Schedule.of_shares(1 / 9, 32, [(0, 96.0), (16, 32.0)])
    assert default.counts(576) == [(0, 96), (16, 32)]
    found = Space(
        default=default, retention=1 / 9, num_layers=32, allowed=lambda schedule: True, first=0
    )
    assert {schedule.layers[0] for schedule in everything(found)} == {0}


def test_a_planted_better_schedule_is_found() -> None:
    """Late second stages, steeply: the divergence is the distance from a shape off the grid."""
    planted = Schedule.of_shares(1 / 9, 32, [(2, 1.0), (21, 0.45)])
    there = np.array(tokens_per_layer(576, planted.counts(576), 32))

    def far(schedule: Schedule, rows: range) -> list[float]:
        present = np.array(tokens_per_layer(576, schedule.counts(576), 32))
        away = float(np.abs(np.sqrt(present) - np.sqrt(there)).mean())
        return [away + 0.01 * math.sin(row) for row in rows]

    search = Search(space(), 32, far)
    best = search.best()
    assert search.mean(best) < 0.3 * search.mean(search.space.default)
    assert best.layers[0] == 2 and 17 <= best.layers[1] <= 25
    assert len(search.scores[search.space.default]) == len(search.scores[best]) == 32


def test_where_nothing_is_better_the_default_comes_out() -> None:
    search = Search(space(), 8, lambda schedule, rows: [float(schedule != space().default)] * 8)
    assert search.best() == search.space.default


@pytest.mark.parametrize("rows", [7, 32])
def test_the_cost_that_is_told_is_not_exceeded(rows: int) -> None:
    measured = 0

    def count(schedule: Schedule, asked: range) -> list[float]:
        nonlocal measured
        measured += len(asked)
        return [float(hash(schedule) % 97)] * len(asked)

    search = Search(space(), rows, count)
    search.best()
    assert measured <= most_answers(rows)
    assert len(search.scores) <= 1 + COARSE + 2 * FINE <= 41
    assert rungs(rows)[-1] == rows


def test_rows_come_from_the_heads_of_a_few_row_groups() -> None:
    def manifest(*groups: tuple[int, ...]) -> Manifest:
        return Manifest(
            shards=tuple(
                Shard(number=n, path=f"{n}.parquet", size=1, rows=sum(own), row_groups=own)
                for n, own in enumerate(groups)
            )
        )

    large = manifest(*((1000, 1000),) * 50)
    units = drawn(large, 64, seed=3)
    assert len(units) == 8 and all(unit.stop - unit.start == 8 for unit in units)
    assert {unit.start for unit in units} <= {0, 1000} and units != drawn(large, 64, seed=4)
    small = manifest((5, 3), (2,))
    assert sum(unit.stop - unit.start for unit in drawn(small, 64, seed=0)) == 10
    assert sum(unit.stop - unit.start for unit in drawn(small, 9, seed=0)) == 9


def test_divergence_is_the_mean_over_tokens() -> None:
    like, found = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    p, q = like.softmax(-1), found.softmax(-1)
    expected = float((p * (p / q).log()).sum(-1).mean())
    assert divergence(like, found) == pytest.approx(expected, rel=1e-5)
    assert divergence(like, like) == 0.0


def test_better_means_by_more_than_the_interval() -> None:
    rng = np.random.default_rng(0)
    default = rng.random(32)
    assert Comparison(default=default, best=default - 0.1, seed=0).better
    assert not Comparison(default=default, best=default + 0.1, seed=0).better
    assert not Comparison(default=default, best=rng.random(32), seed=0).better
    assert not Comparison(default=default, best=None, seed=0).better


SETTINGS = Pruning(schedule="1:20,3:9", proxy_positions="with_last")


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return lively_llava(), tiny_processor()


def test_answers_are_the_engines_and_can_be_led_along(tiny: tuple[Any, Any]) -> None:
    """Along its own answer a model gives the logits that it gave before, and along another's those
    of a prefill of both where nothing is pruned."""
    requests = mixed_requests(9, seed=2, max_new_tokens=8)
    answers = Answers(*tiny, max_new_tokens=8, max_running=4)
    prepare = Preprocessor(tiny[1], type(answers.adapter))
    prompts = [each for request in requests if isinstance(each := prepare(request), Prepared)]
    for pruning in (Pruning(), SETTINGS):
        engine = Engine(*tiny, pruning=pruning, sampling=Sampling(max_new_tokens=8))
        expected = by_id(engine.generate(requests))
        own = served(answers(pruning, prompts))
        assert {n: list(one.token_ids) for n, one in own.items()} == {
            n: result.token_ids for n, result in expected.items()
        }
        again = served(
            answers(pruning, prompts, {name: one.token_ids for name, one in own.items()})
        )
        for name, one in own.items():
            torch.testing.assert_close(again[name].logits_NV, one.logits_NV)
    led = {prompt.id: tuple(range(5, 5 + 1 + prompt.id % 6)) for prompt in prompts}
    for name, one in served(answers(Pruning(), prompts, led)).items():
        assert one.token_ids == led[name]
        torch.testing.assert_close(
            one.logits_NV, whole(tiny, prompts[name], led[name]), atol=1e-4, rtol=1e-3
        )


def test_rules_of_decoding_are_off_and_named(
    model: str, shard: str, tmp_path: Path, tiny: tuple[Any, Any]
) -> None:
    assert Answers(*tiny, max_new_tokens=4).rules_off == ()
    place = Path(shutil.copytree(model, tmp_path / "model"))
    rules = place / "generation_config.json"
    there = json.loads(rules.read_text()) if rules.exists() else {}
    rules.write_text(json.dumps(there | {"repetition_penalty": 1.05, "top_p": 0.5}))
    told: list[str] = []
    given = made_of(
        model=str(place), input=(shard,), prompt=(PROMPT,), columns="image=jpg", retention=0.5
    )
    Calibration(Plan.of(given.replace(max_new_tokens=2), 8), told.append)
    (line,) = (line for line in told if "generation_config.json" in line)
    assert "repetition_penalty off here" in line and "raw greedy answers" in line


def served(answers: Any) -> dict[Any, Answer]:
    found = dict(answers)
    assert all(isinstance(one, Answer) for one in found.values())
    return found


def whole(tiny: tuple[Any, Any], prompt: Prepared, answer: tuple[int, ...]) -> Tensor:
    """Logits of transformers before each token of an answer, all in one pass."""
    ids = torch.tensor([[*prompt.input_ids, *answer]])
    inputs = {}
    if prompt.image_inputs:
        inputs["pixel_values"] = torch.cat([one["pixel_values"] for one in prompt.image_inputs])
    with torch.no_grad():
        logits = tiny[0](input_ids=ids, **inputs).logits[0]
    return logits[-len(answer) - 1 : -1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_checkpoint(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("input") / "a.parquet"
    rows = [{"jpg": encoded(picture(n)), "prompt": PROMPT if n % 3 else None} for n in range(14)]
    schema = pa.schema([("jpg", pa.binary()), ("prompt", pa.string())])
    write_shard(path, rows, schema, row_group=5)
    return str(path)


FLAGS = ("--rows", "12", "--columns", "image=jpg", "--prompt", PROMPT, "--max-new-tokens", "4")


def test_calibrate_writes_a_file_that_a_job_takes(
    model: str, shard: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "schedule.yaml"
    flags = ["calibrate", "--model", model, "--input", shard, "--retention", "1/3", *FLAGS]
    assert benchmark.main([*flags, "--output", str(file), "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "6 to search on, 6 held out" in told and "pruned ones" in told and not file.exists()
    assert benchmark.main([*flags, "--output", str(file)]) == 0
    printed = capsys.readouterr().out
    written = yaml.safe_load(file.read_text())
    assert written["layers"] == 6 and written["search_rows"] == written["held_out_rows"] == 6
    assert written["chosen"] in ("default", "searched") and written["schedule"] in printed
    assert written["retention"] == pytest.approx(1 / 3) and written["conditions"]["torch"]
    rows = written["divergence"]
    assert rows["default"]["mean"] > 0
    assert all(row["prefill_flops"] <= rows["default"]["prefill_flops"]
               for name, row in rows.items() if name != "difference")  # fmt: skip
    text = f"{written['schedule']}@6"
    assert str(Schedule.load(file)) == text
    output = str(tmp_path / "out")
    job = ["--model", model, "--input", shard, "--output", output, *FLAGS[2:]]
    assert main(caption.JOB, [*job, "--schedule", str(file), "--dry-run"]) == 0
    assert f"schedule: {text}\n" in capsys.readouterr().out


def test_calibrate_writes_a_pruning_config_that_engines_take(
    model: str, shard: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Path(shutil.copytree(model, tmp_path / "model"))
    file = place / FILE
    file.write_text('{"schedule_shape": "family", "proxy_positions": "with_last"}')
    flags = ["calibrate", "--model", str(place), "--input", shard, "--retention", "1/3", *FLAGS]
    scan = [*flags, "--output", str(file), "--encoder", "scan"]
    assert benchmark.main(scan) == 2 and "without an encoder" in capsys.readouterr().err
    other = [*flags, "--output", str(file), "--proxy-positions", "last"]
    assert benchmark.main(other) == 2
    assert "says proxy_positions with_last" in capsys.readouterr().err
    assert benchmark.main([*flags, "--output", str(file)]) == 0
    content = json.loads(file.read_text())
    shape = content["schedule_shape"]["1/3"]
    assert shape.endswith("@6") and content["schedule_shape"]["other"] == "family"
    assert content["about"]["calibrated at 1/3"]["held_out_rows"] == 6
    adapter = adapt(load(str(place), device="cpu")[0])
    found = adapter.settle(Pruning(retention=1 / 3))
    assert (str(found.schedule_shape), found.proxy_positions) == (shape, "with_last")
    shares = Schedule.parse(shape)
    visual = adapter.max_visual_tokens
    wanted = shares.counts(visual)
    for (layer, keep), (at, own) in zip(found.stages(visual, 6), wanted, strict=True):
        assert layer == at and abs(keep - own) <= 2


def written(path: Path, **changes: Any) -> Path:
    values = {"schedule": "1:0.2,3:0.1", "layers": 6} | changes
    path.write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}))
    return path


def test_settings_hold_the_stages_and_not_the_file(tmp_path: Path) -> None:
    """So a run that goes on does as it began, whatever has become of the file."""
    file = written(tmp_path / "schedule.yaml")
    got, _ = cli.read_call(["--schedule", str(file)], prog="caption.py", description="")
    assert got.results()["schedule"] == "1:0.2,3:0.1@6"
    assert got.pruning == Pruning(schedule=Schedule.load(file))
    run = tmp_path / "run.yaml"
    run.write_text(run_yaml.dump(got))
    written(file, schedule="2:0.5")
    assert cli.read_call(["--config", str(run)], prog="caption.py", description="") == (got, False)
    assert got.pruning.schedule == Schedule.parse("1:0.2, 3:0.1 @ 6")


def test_a_schedule_of_another_depth_is_refused(tmp_path: Path) -> None:
    pruning = Pruning(schedule=Schedule.load(written(tmp_path / "schedule.yaml")))
    assert pruning.stages(100, 6) == [(1, 20), (3, 10)]
    with pytest.raises(UserError, match="for decoders of 6 layers, and this model has 32"):
        pruning.stages(100, 32)
    with pytest.raises(UserError, match="6 layers, and this model has 8"):
        Engine(lively_llava(layers=8), tiny_processor(), pruning=pruning)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes(b"\xff\xfe\x00"), "cannot be read"),
        (lambda path: path.write_text("a: [1"), "not YAML"),
        (lambda path: path.write_text("schedule: 1:0.5\nlayers: 4"), "has no text 'schedule'"),
        (lambda path: written(path, layers=True), "has no text 'schedule' and number 'layers'"),
        (lambda path: written(path, schedule="1;2"), "is not layer:keep"),
        (lambda path: written(path, layers=2), "last possible stage is at 2"),
    ],
)
def test_wrong_files_end_with_one_line(
    make: Callable[[Path], object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "schedule.yaml"
    make(file)
    assert main(caption.JOB, ["--schedule", str(file), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and str(file) in error
    assert benchmark.main(["cost", "--shape", "llava-1.5-7b", "--schedule", str(file)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and str(file) in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"--output": "{dir}/schedule.txt"}, "ending in .yaml"),
        ({"--output": "{dir}/nowhere/x.yaml"}, "no file can be written there"),
        ({"--rows": "4"}, "at least 8"),
        ({"--retention": "1"}, "no shape that could be searched"),
        ({"--method": "divprune"}, "no shape that could be searched"),
        ({"--method": "none", "--encoder": "scan"}, "nothing to search"),
        ({"--model": "{dir}/nowhere"}, "no model there"),
        ({"--input": "{dir}/nowhere"}, "no input there"),
        ({"--config": "{dir}/run.yaml"}, "give --retention instead"),
    ],
)
def test_mistakes_end_with_code_2_and_one_line(
    flags: Mapping[str, str | None],
    message: str,
    model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "run.yaml").write_text("schedule: '1:9'\n")
    given = {"--model": model, "--output": "{dir}/x.yaml"} | dict(flags)
    if "--config" not in flags:
        given.setdefault("--retention", "1/3")
    words = [word.format(dir=tmp_path) for pair in given.items() if pair[1] for word in pair]  # type: ignore[union-attr]
    assert benchmark.main(["calibrate", *words]) == 2
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1] and error.splitlines()[-1].startswith("benchmark.py: ")


def test_rows_that_cannot_be_asked_are_left_out_until_too_few_remain(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = tmp_path / "a.parquet"
    schema = pa.schema([("image", pa.binary()), ("prompt", pa.string())])
    rows = [{"image": encoded(picture(n)) if n else b"", "prompt": PROMPT} for n in range(8)]
    write_shard(shard, rows, schema)
    flags = ["calibrate", "--model", model, "--input", str(shard), "--retention", "1/3"]
    assert benchmark.main([*flags, "--rows", "8", "--output", str(tmp_path / "x.yaml")]) == 2
    error = capsys.readouterr().err
    assert "a row is left out: image_empty" in error and "only 7 rows" in error


def test_a_job_config_says_what_is_wrong_with_a_schedule() -> None:
    for text, message in (("1:0.2@", "behind @"), ("1:0.2@six", "behind @"), ("@6", "layer:keep")):
        with pytest.raises(UserError, match=message):
            made_of(schedule=text)
