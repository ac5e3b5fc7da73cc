"""jobs/caption.py from its arguments to its output, with a real (tiny, random) model."""

import ast
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import caption
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from tests.engine.support import MANY_SIZES
from tests.every_family.family import ARCHITECTURES, FAMILIES
from tests.job.fakes import encoded, write_shard
from tests.tiny.llava import save_tiny_checkpoint
from trio.bundled import SHARD
from trio.engine.engine import Engine
from trio.engine.request import Request, Result, Sampling
from trio.job.command import main
from trio.pruning.options import Pruning

ROOT = Path(__file__).resolve().parents[1]
BYTES_OR_PATH = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SCHEMA = pa.schema(
    [("id", pa.string()), ("image", pa.list_(BYTES_OR_PATH)), ("prompt", pa.string())]
)
PROMPT = "what is in the picture ?"


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_checkpoint(tmp_path_factory.mktemp("model")))


def run(*flags: str) -> int:
    return main(caption.JOB, [*flags, "--log-interval", "60"])


def picture(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), np.uint8)
    return Image.fromarray(noise).resize(size)


def cell(data: bytes | None, path: str | None = None) -> list[dict[str, Any]]:
    return [{"bytes": data, "path": path}]


def good_rows() -> list[dict[str, Any]]:
    words = ["red", "green", "blue", "left", "right", "top"]
    return [
        {
            "id": f"good-{n}",
            "image": cell(png_of(n)),
            "prompt": f"{PROMPT} {words[n % 6]} " * (n % 4),
        }
        | ({"prompt": PROMPT} if n % 4 == 0 else {})
        for n in range(26)
    ]


def png_of(seed: int) -> bytes:
    return encoded(picture(seed))


def answers(output: Path, setting: int = 0) -> dict[str, dict[str, Any]]:
    """By id, those of one setting; each setting has answered all."""
    rows = pq.read_table(output / "rows").to_pylist()
    asked = {(row["id"], row["setting"]) for row in rows}
    ids, settings = ({key[place] for key in asked} for place in (0, 1))
    assert len(asked) == len(rows) == len(ids) * len(settings)
    return {row["id"]: row for row in rows if row["setting"] == setting}


def said(model: str, rows: Sequence[Mapping[str, Any]], **options: Any) -> dict[str, Result]:
    """The engine's own answers, without a job around it."""
    engine = Engine.from_pretrained(model, device="cpu", **options)
    requests = [
        Request(
            prompt=row["prompt"],
            images=tuple(Image.open(io.BytesIO(part["bytes"])) for part in row["image"]),
            id=row["id"],
        )
        for row in rows
    ]
    return {result.id: result for result in engine.generate(requests)}


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_paths_a_config_fed_back_and_what_differs(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Paths, no id, no prompt, renamed columns; then run.yaml again."""
    (tmp_path / "in" / "img").mkdir(parents=True)
    for n in range(3):
        picture(n).save(tmp_path / "in" / "img" / f"{n}.png")
    schema = pa.schema([("jpg", pa.string()), ("answers", pa.string())])
    shard = [{"jpg": f"img/{n}.png", "answers": "yes"} for n in range(3)]
    write_shard(tmp_path / "in" / "0.parquet", shard, schema)
    first = tmp_path / "first"
    flags = ["--input", str(tmp_path / "in" / "*.parquet"), "--output", str(first)]
    flags += ["--model", model, "--prompt", PROMPT, "--columns", "image=jpg", "--score", "exact"]
    assert run(*flags, "--schedule", "1:20,3:5", "--max-new-tokens", "4") == 0
    rows = pq.read_table(first / "rows").to_pylist()
    assert [row["id"] for row in rows] == [f"0.parquet#{n}" for n in range(3)]
    assert all(row["visual_tokens_stages"] == [20, 5] for row in rows)
    assert all(row["image_width"] == 40 and row["prompt"] == PROMPT for row in rows)
    assert all(row["error"] is None for row in rows)
    printed = capsys.readouterr().out
    assert "schedule 1:20,3:5" in printed and str(first) in printed

    again = ["--config", str(first / "run.yaml")]
    other = str(tmp_path / "other")
    assert run(*again, "--output", other, "--compare", "1,given", "--dry-run") == 0
    one, two = yaml.safe_load((first / "run.yaml").read_text()), capsys.readouterr().out
    assert one | {"output": other, "compare": ["1", "given"]} == yaml.safe_load(two)
    assert "# each with unpruned, trio 1:20,3:5\n" in two
    before = {p: p.stat().st_mtime_ns for p in first.rglob("*")}
    write_shard(tmp_path / "in" / "1.parquet", shard, schema)
    assert run(*again) == 0
    assert "finished already: nothing to do" in capsys.readouterr().out
    assert run(*again, "--seed", "5") == 2
    assert "holds a run that differs in this: seed: 0, now 5" in capsys.readouterr().err
    assert run(*again, "--compare", "1,given") == 2
    assert "holds a run that differs in this: compare: None, now " in capsys.readouterr().err
    assert not {"metrics.json", "metrics.md"} & {p.name for p in before}
    assert {p: p.stat().st_mtime_ns for p in first.rglob("*")} == before


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_a_comparison_is_one_run(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"id": str(n), "image": cell(png_of(n)), "prompt": PROMPT, "answers": "yes"}
        for n in range(3)
    ]
    schema = SCHEMA.append(pa.field("answers", pa.string()))
    shard = write_shard(tmp_path / "in.parquet", rows, schema)
    out = tmp_path / "out"
    flags = ["--input", str(shard), "--output", str(out), "--model", model, "--score", "exact"]
    flags += ["--retention", "0.4", "--max-new-tokens", "4", "--compare", "1,given,fastv:1/4"]
    assert run(*flags) == 0
    printed = capsys.readouterr().out
    names = ["unpruned", "trio 2/5", "fastv 1/4"]
    assert "right responses" in printed and all(name in printed for name in names)
    sampling, alone = Sampling(max_new_tokens=4), Pruning(retention=0.25, method="fastv")
    prunings = [Pruning(), Pruning(retention=0.4), alone]
    for setting, pruning in enumerate(prunings):
        expected = said(model, rows, pruning=pruning, sampling=sampling)
        for key, row in answers(out, setting).items():
            assert (row["response"], row["error"]) == (expected[key].response, None)
            assert row["prompt_number"] == 0
    summary = summary_of(out)
    full, *pruned = summary["settings"]
    assert [one["name"] for one in summary["settings"]] == names
    assert [one["rows"] for one in summary["settings"]] == [3, 3, 3]
    assert [one["scored"] for one in summary["settings"]] == [3, 3, 3]
    assert full["retention"] == 1.0 and full["prefill_flops"] == full["prefill_flops_unpruned"]
    for one in pruned:
        assert one["prefill_flops_unpruned"] == full["prefill_flops"] > one["prefill_flops"]
    figures = json.loads((out / "metrics.json").read_text())
    assert [one["name"] for one in figures["settings"]] == names
    assert (out / "metrics.md").read_text() in printed
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert not (out / "unpruned").exists()
    assert run(*flags) == 0
    assert "finished already: nothing to do" in capsys.readouterr().out
    assert run(*flags[:-1], "1,given") == 2
    told = capsys.readouterr().err
    assert "holds a run that differs in this: " in told and " compare: " in told
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_run_yaml_of_an_earlier_version_compares_in_one_run(model: str, tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "in.parquet", good_rows()[:2], SCHEMA)
    out = tmp_path / "out"
    written = {"input": [str(shard)], "output": str(out), "model": model, "max_new_tokens": 4}
    written |= {"retention": 0.4, "compare_unpruned": True}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(written))
    assert run("--config", str(tmp_path / "run.yaml")) == 0
    assert yaml.safe_load((out / "run.yaml").read_text())["compare"] == ["1", "given"]
    assert {row["retention"] for row in answers(out, 0).values()} == {1.0}
    assert all(row["retention"] < 0.5 for row in answers(out, 1).values())


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_images_of_many_shapes_from_parquet_to_parquet(tmp_path: Path, name: str) -> None:
    """Of every family; each image has its own number of visual tokens, and several are in a row."""
    family = FAMILIES[name]()
    model = str(family.save(tmp_path / "model"))
    images = [
        [{"bytes": encoded(picture(n, size)), "path": None}] for n, size in enumerate(MANY_SIZES)
    ]
    images.append([part for image in images[:3] for part in image])
    rows = [{"id": str(n), "image": image, "prompt": PROMPT} for n, image in enumerate(images)]
    shard = write_shard(tmp_path / "in.parquet", rows, SCHEMA)
    out = tmp_path / "out"
    flags = ["--input", str(shard), "--output", str(out), "--model", model]
    assert run(*flags, "--retention", "0.4", "--max-new-tokens", "6", "--save-kept") == 0
    got = answers(out)
    options = {"pruning": Pruning(retention=0.4), "sampling": Sampling(max_new_tokens=6)}
    for key, result in said(model, rows, **options).items():
        row = got[key]
        assert row["error"] is None and row["response"] == result.response
        assert row["visual_tokens"] == result.visual_tokens
        assert row["visual_tokens_stages"] == list(map(len, row["kept_tokens"]))
        assert abs(row["retention"] - 0.4) * row["visual_tokens"] <= row["num_images"]
    counts = {row["visual_tokens"] for row in got.values()}
    assert len(counts) > 5 if family.per_image else counts == {family.planned, 3 * family.planned}
    assert got["9"]["num_images"] == 3


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_a_reduction_in_the_encoder_from_parquet_to_parquet(tmp_path: Path, model: str) -> None:
    """With the class token, which stands for no patch, among what is kept; beside the unpruned."""
    shard = write_shard(tmp_path / "in.parquet", good_rows(), SCHEMA)
    out = tmp_path / "out"
    flags = ["--input", str(shard), "--output", str(out), "--model", model, "--save-kept"]
    flags += ["--encoder", "visionzip", "--retention", "0.25", "--max-new-tokens", "4"]
    assert run(*flags, "--compare", "1,given") == 0
    settings = yaml.safe_load((out / "run.yaml").read_text())
    assert (settings["encoder"], settings["method"]) == ("visionzip", "trio")
    for row in answers(out, 1).values():
        assert row["error"] is None
        entered, *stages = row["kept_tokens"]
        assert len(entered) == row["visual_tokens_encoder"] < row["visual_tokens"]
        assert None in entered
        assert row["visual_tokens_stages"] == list(map(len, stages))
        assert abs(row["retention"] - 0.25) * row["visual_tokens"] <= row["num_images"]
    assert {row["retention"] for row in answers(out, 0).values()} == {1.0}


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_the_demo_compares_and_ends_with_images_and_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    flags = ["--output", str(out), "--limit", "5"]
    assert run(*flags) == 0
    printed, told = capsys.readouterr()
    assert "5/5 rows" in told
    shown = printed.splitlines()
    assert run(*flags) == 0
    assert "finished already: nothing to do" in capsys.readouterr().out
    assert (out / "metrics.md").read_text() in printed and (out / "metrics.json").exists()
    names = [one["name"] for one in summary_of(out)["settings"]]
    assert names == ["unpruned", "trio 1/9"]
    assert yaml.safe_load((out / "run.yaml").read_text())["compare"] == ["1", "given"]
    both = [answers(out, setting) for setting, _ in enumerate(names)]
    answered = both[0]
    assert both[1].keys() == answered.keys() and len(answered) == 5
    for number in range(3):
        path = out / "images" / f"scene-{number:04d}.jpg"
        assert Image.open(path).size == (192, 192)
        place = len(shown) - 1 - shown[::-1].index(str(path))
        rows = [row for key, row in answered.items() if key.startswith(f"{path.stem}-")]
        assert len(rows) == (1 if number == 2 else 2)
        for row, line in zip(rows, shown[place + 1 :], strict=False):
            said = [setting[row["id"]]["response"] for setting in both]
            if said[0] != said[1]:
                said = [f"{name}: {one}" for name, one in zip(names, said, strict=True)]
            told = "; ".join(dict.fromkeys(said))
            assert line.split() == f"{row['prompt']} {told}".split()
    command = shown[-2].removeprefix("to see some: ")
    ours = command.replace("python", shlex.quote(sys.executable), 1)
    seen = subprocess.run(ours, shell=True, capture_output=True, text=True, check=True).stdout
    lines = [ast.literal_eval(line) for line in seen.splitlines()]
    told_of = [{(row["id"], row["response"]) for row in one.values()} for one in both]
    assert len(lines) == 5 and {(one["id"], one["response"]) for one in lines} <= set.union(
        *told_of
    )


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_the_readmes_prompt_gets_right_captions_of_the_bundled_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundled = pq.read_table(SHARD).slice(0, 10).to_pylist()
    right = {row["id"]: row["answers"][0] for row in bundled if row["kind"] == "caption"}
    rows = [{"id": row["id"], "image": [row["image"]]} for row in bundled if row["id"] in right]
    shard = write_shard(tmp_path / "in.parquet", rows, SCHEMA.remove(2))
    flags = ["--input", str(shard), "--output", str(tmp_path / "out")]
    assert run(*flags, "--prompt", "Describe the image in one sentence.") == 0
    assert {key: row["response"] for key, row in answers(tmp_path / "out").items()} == right
    assert "was not taught" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_eadp_with_the_bundled_models_own_text_tower(tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ["--output", str(out), "--limit", "6", "--method", "eadp"]
    assert run(*flags) == 0
    assert yaml.safe_load((out / "run.yaml").read_text())["text_tower"] == "demo"
    for row in answers(out, 1).values():
        assert row["error"] is None and row["visual_tokens_stages"] == [64]
    assert {row["retention"] for row in answers(out, 0).values()} == {1.0}


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_a_users_adapter_and_a_system_message(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"id": str(n), "image": cell(png_of(n)), "prompt": PROMPT} for n in range(6)]
    shard = write_shard(tmp_path / "in.parquet", rows, SCHEMA)
    system = "describe the digit please"
    flags = ["--input", str(shard), "--model", model, "--retention", "0.4", "--max-new-tokens", "9"]
    flags += ["--adapters", "llava=tests.every_family.theirs:Theirs"]
    flags += ["--output", str(tmp_path / "out")]
    assert run(*flags, "--system-prompt", system) == 0
    got = {key: row["response"] for key, row in answers(tmp_path / "out").items()}
    options: dict[str, Any] = {"system": system, "sampling": Sampling(max_new_tokens=9)}
    expected = {
        position_ids: {
            key: result.response
            for key, result in said(
                model, rows, pruning=Pruning(retention=0.4, position_ids=position_ids), **options
            ).items()
        }
        for position_ids in ("keep", "renumber")
    }
    assert got == expected["keep"] != expected["renumber"]
    assert run(*flags, "--system-prompt", "other") == 2
    assert "system_prompt" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_a_users_method_with_its_own_settings(tmp_path: Path, model: str) -> None:
    rows = [{"id": str(n), "image": cell(png_of(n)), "prompt": PROMPT} for n in range(4)]
    shard = write_shard(tmp_path / "in.parquet", rows, SCHEMA)
    method = {"method": "tests.pruning.longest:Longest", "method_options": "end=short,power=1"}
    flags = ["--input", str(shard), "--model", model, "--retention", "0.4", "--max-new-tokens", "6"]
    flags += ["--method", method["method"], "--method-options", method["method_options"]]
    assert run(*flags, "--output", str(tmp_path / "out")) == 0
    expected = said(
        model,
        rows,
        pruning=Pruning(retention=0.4, **method),  # type: ignore[arg-type]
        sampling=Sampling(max_new_tokens=6),
    )
    assert {key: row["response"] for key, row in answers(tmp_path / "out").items()} == {
        key: result.response for key, result in expected.items()
    }


def summary_of(output: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((output / "summary.json").read_text())
    return loaded


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize(
    ("spoilt", "flags", "message"),
    [
        ("config.json", [], "is quantised (awq, 4 bit)"),
        # The same way from an engine to the user.
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("model.safetensors", [], "no readable safetensors file"),
                (None, ["--max-pixels", "50000"], "max_pixels cannot be set"),
                (None, ["--retention", "0.01"], "retention"),
                (None, ["--adapters", "llava=no_such_module:Theirs"], "Theirs, cannot be loaded"),
            ]
        ),
    ],
)
def test_what_an_engine_cannot_serve_is_the_users_mistake(
    model: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    spoilt: str | None,
    flags: Sequence[str],
    message: str,
) -> None:
    directory = shutil.copytree(model, tmp_path / "model")
    if spoilt == "config.json":
        config = json.loads((directory / spoilt).read_text())
        config["quantization_config"] = {"quant_method": "awq", "bits": 4}
        (directory / spoilt).write_text(json.dumps(config))
    elif spoilt is not None:
        (directory / spoilt).write_bytes((directory / spoilt).read_bytes()[:-64])
    shard = write_shard(tmp_path / "in.parquet", good_rows()[:2], SCHEMA)
    paths = ["--input", str(shard), "--output", str(tmp_path / "out"), "--model", str(directory)]
    assert run(*paths, "--retention", "0.4", *flags) == 2
    errors = capfd.readouterr().err
    (line,) = [line for line in errors.splitlines() if line.startswith("caption.py: ")]
    assert message in line and "Traceback" not in errors


MISTAKES = [
    (["--method", "eadp", "--model", "org/name"], "give as --text-tower the CLIP"),
    (["--input", "nowhere.parquet"], "no input there"),
    (["--input", "{shard}", "--columns", "image=photo"], "it has id, image, prompt"),
    (["--input", "{shard}", "--model", "./nowhere"], "no model there"),
    (["--input", "{shard}", "--output", "{dir}"], "holds other files"),
    (["--config", "{dir}/nowhere.yaml"], "cannot be read"),
    (["--frobnicate"], "unrecognized arguments"),
    (["--compare-unpruned"], "did you mean '--compare'?"),
    (["--preset", "pope"], "unrecognized arguments"),
    (["--input", "{shard}", "--compare", "1,1/3,2/6"], "trio 1/3 stands twice"),
    (["--compare", "1,eadp:1/3", "--model", "org/name"], "give as --text-tower the CLIP"),
]


@pytest.mark.parametrize(("flags", "message"), MISTAKES)
def test_mistakes_end_with_code_2_and_one_line(
    flags: Sequence[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = write_shard(tmp_path / "in.parquet", good_rows()[:2], SCHEMA)
    flags = [flag.format(shard=shard, dir=tmp_path) for flag in flags]
    assert main(caption.JOB, flags) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1
    assert captured.err.startswith("caption.py: ") and "Traceback" not in captured.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.parquet"]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_the_models_rules_of_decoding_are_followed_and_noted(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ruled = tmp_path / "model"
    shutil.copytree(model, ruled)
    rules = {"eos_token_id": 2, "repetition_penalty": 1.4, "num_beams": 4}
    (ruled / "generation_config.json").write_text(json.dumps(rules))
    rows = [{"id": str(n), "image": cell(png_of(n)), "prompt": PROMPT} for n in range(8)]
    shard = write_shard(tmp_path / "in.parquet", rows, SCHEMA)
    out = tmp_path / "out"
    flags = ["--input", str(shard), "--model", str(ruled), "--retention", "0.4", "--output"]
    flags += [str(out), "--max-new-tokens", "9", "--no-repeat-ngram-size", "2", "--actors", "2"]
    assert run(*flags) == 0
    printed = capsys.readouterr()
    notice = "generation_config.json: not followed: num_beams 4"
    told = "decoding: greedy, repetition_penalty 1.4 (generation_config.json)"
    assert [(printed.out + printed.err).count(line) for line in (notice, told)] == [1, 1]
    text = (out / "run.yaml").read_text()
    assert f"# {told}, no_repeat_ngram_size 2 (given)\n# {notice}\n" in text
    sampling = Sampling(max_new_tokens=9, no_repeat_ngram_size=2)
    expected = said(str(ruled), rows, pruning=Pruning(retention=0.4), sampling=sampling)
    got = {key: row["response"] for key, row in answers(out).items()}
    assert got == {key: result.response for key, result in expected.items()}
    options: dict[str, Any] = {"pruning": Pruning(retention=0.4)}
    plain = said(model, rows, **options, sampling=Sampling(max_new_tokens=9))
    assert got != {key: result.response for key, result in plain.items()}
    assert run(*flags, "--repetition-penalty", "1") == 2
    assert "repetition_penalty: None, now 1.0" in capsys.readouterr().err


def test_a_dry_run_prints_the_plan_and_touches_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = write_shard(tmp_path / "in.parquet", good_rows(), SCHEMA)
    out = tmp_path / "out"
    assert main(caption.JOB, ["--dry-run", "--input", str(shard), "--output", str(out)]) == 0
    printed = capsys.readouterr().out
    values = yaml.safe_load(printed)
    assert values["input"] == [str(shard)] and values["retention"] == pytest.approx(1 / 9)
    assert "26 rows of 1 shard;" in printed and "image from image" in printed
    assert not out.exists()


def test_the_script_runs_by_itself(tmp_path: Path) -> None:
    """From another directory, as users call it: its own package, its exit codes, no traceback."""
    script = [sys.executable, str(ROOT / "jobs" / "caption.py")]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    options: dict[str, Any] = {"cwd": tmp_path, "capture_output": True, "text": True}
    helped = subprocess.run([*script, "--help"], env=environment, **options)
    assert helped.returncode == 0 and "--max-error-rate" in helped.stdout
    wrong = subprocess.run([*script, "--input", "nowhere"], env=environment, **options)
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and wrong.stdout == ""
