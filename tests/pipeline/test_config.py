"""Settings from flags and files, and back."""

import json
from pathlib import Path

import caption
import pytest
import yaml

from trio.engine.request import Sampling
from trio.errors import UserError
from trio.pipeline import cli, config, job
from trio.pipeline.config import FIELDS, JobConfig
from trio.pipeline.policy import ImagePolicy
from trio.pruning.options import Pruning
from trio.pruning.pruning_config import PruningDefaults

PARSER = cli.parser("caption.py", "description", "epilog")


def from_flags(*flags: str) -> JobConfig:
    return cli.settings_from(PARSER.parse_args(flags))


def test_flags_that_users_rely_on_exist() -> None:
    flags = [
        "input",
        "output",
        "model",
        "prompt",
        "retention",
        "schedule",
        "method",
        "encoder",
        "max-new-tokens",
        "actors",
        "gpus-per-actor",
        "batch-tokens",
        "limit",
        "seed",
        "columns",
        "max-error-rate",
        "save-kept",
        "row-timeout",
        "min-pixels",
        "max-pixels",
        "max-image-pixels",
        "dtype",
        "image-roots",
        "allow-remote-images",
        "remote-images-from",
        "config",
        "dry-run",
    ]
    text = PARSER.format_help()
    assert [flag for flag in flags if f"--{flag}" not in text] == []


def test_help_names_defaults_and_units() -> None:
    text = " ".join(PARSER.format_help().split())
    assert "longest answer [tokens] (default: 64)" in text
    assert "(default: 1/9 unless --schedule is given) [fraction]" in text


def test_flags_are_read() -> None:
    got = from_flags(
        "--input", "a.parquet", "b.parquet", "--retention", "2/9", "--actors", "3",
        "--gpus-per-actor", "0.5", "--save-kept", "--seed", "7", "--columns", "image=jpg",
    )  # fmt: skip
    assert got.input == ("a.parquet", "b.parquet")
    assert got.retention == pytest.approx(2 / 9)
    assert (got.actors, got.gpus_per_actor, got.save_kept, got.seed) == (3, 0.5, True, 7)
    assert got.pruning().retention == got.retention and got.pruning().seed == 7


def test_settings_of_the_pruning_reach_the_engine() -> None:
    got = from_flags(
        "--schedule", "1:9", "--proxy-positions", "last", "--proxy-layer", "previous",
        "--proxy-head", "input_embedding", "--position-ids", "keep",
    )  # fmt: skip
    assert got.pruning() == Pruning(
        schedule="1:9",
        proxy_positions="last",
        proxy_layer="previous",
        proxy_head="input_embedding",
        position_ids="keep",
    )
    plain = JobConfig().pruning()
    assert (plain.proxy_layer, plain.proxy_head) == ("next", "output")
    filled = JobConfig().with_pruning_defaults(PruningDefaults())
    assert (filled.proxy_layer, filled.proxy_head) == ("next", "output")
    assert (filled.schedule_shape, filled.position_ids) == ("family", None)
    assert config.results(got)["proxy_layer"] == "previous"
    assert config.results(got)["proxy_head"] == "input_embedding"


@pytest.mark.parametrize(
    ("flags", "score"),
    [
        ([], "objects"),
        (["--score", "none"], "none"),
        (["--columns", "prompt=none", "--prompt", "Is there a 7?"], "none"),
        (["--input", "mine.parquet"], "none"),
        (["--input", "mine.parquet", "--score", "exact"], "exact"),
    ],
)
def test_only_the_bundled_shard_is_scored_unasked(flags: list[str], score: str) -> None:
    got = from_flags(*flags)
    settled = job.resolve(caption.JOB, got)
    assert settled.score == score == config.results(settled)["score"]


def test_run_yaml_reads_back_to_the_same_settings(tmp_path: Path) -> None:
    first = from_flags("--schedule", "1:92,10:54,15:22", "--prompt", "it's: a #1", "--limit", "9")
    path = tmp_path / "run.yaml"
    path.write_text(config.dump(first, "a comment"))
    assert path.read_text().startswith("# a comment\n")
    assert from_flags("--config", str(path)) == first
    assert set(yaml.safe_load(path.read_text())) == set(FIELDS)


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("schedule: '1:92,10:54'\nseed: 3\nlimit: null\n")
    got = from_flags("--config", str(path), "--retention", "0.5", "--seed", "4")
    assert (got.retention, got.schedule, got.seed, got.limit) == (0.5, None, 4, None)


@pytest.mark.parametrize(
    ("flags", "left_out"),
    [
        (["--retention", "1/3"], {"schedule_shape"}),
        (["--retention", "1/9"], set()),
        (["--retention", "1/3", "--schedule-shape", "family"], set()),
        (["--model", "other/model"], {"proxy_positions", "fill_up", "schedule_shape", "revision"}),
        (["--model", "one/model", "--seed", "3"], set()),
        (["--model", "other/model", "--fill-up", "mixed", "--proxy-positions", "last",
          "--schedule-shape", "family"], {"revision"}),
    ],
)  # fmt: skip
def test_what_a_run_resolved_does_not_outlive_what_it_was_resolved_for(
    flags: list[str], left_out: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = {"fill_up": "reference", "proxy_positions": "with_last", "schedule_shape": "start"}
    held |= {"revision": "a" * 40}
    path = tmp_path / "run.yaml"
    ran = JobConfig(model="one/model").replace(retention=1 / 9, **held)
    path.write_text(config.dump(ran))
    got = from_flags("--config", str(path), *flags)
    assert {name for name in held if getattr(got, name) is None} == left_out
    told = capsys.readouterr().err
    assert all(name in told for name in left_out) and bool(told) == bool(left_out)
    # What somebody wrote by hand, for any model and retention, stays.
    path.write_text("schedule_shape: start\nfill_up: reference\n")
    by_hand = from_flags("--config", str(path), "--retention", "1/3", "--model", "other/model")
    assert (by_hand.schedule_shape, by_hand.fill_up) == ("start", "reference")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("retenshun: 0.5", r"unknown key 'retenshun' \(did you mean 'retention'\?\)"),
        ("retention: lots", "retention: expected a number"),
        ("seed: 1.5", "seed: expected a whole number"),
        ("save_kept: 1", "save_kept: expected true or false"),
        ("seed: null", "seed is empty"),
        ("- a\n- b", "key: value"),
        ("a: [", "not YAML"),
    ],
)
def test_files_with_mistakes(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        from_flags("--config", str(path))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "fastest"], "unknown method .fastest.; available: trio, none, random"),
        (["--encoder", "zip"], "unknown encoder .zip.; available: none, visionzip"),
        (["--method", "magic"], "unknown method 'magic'"),
        (["--proxy-layer", "last"], "unknown proxy-layer 'last'; available: next, previous"),
        (["--proxy-head", "lm"], "unknown proxy-head 'lm'; available: output, input_embedding"),
        (["--schedule", "0:9", "--proxy-layer", "previous"], "begin at layer 1"),
        (["--retention", "0"], "--retention: must be above 0 and at most 1"),
        (["--retention", "9/1"], "--retention: must be above 0 and at most 1"),
        (["--retention", "1/0"], "--retention: expected a number"),
        (["--retention", "nan"], "--retention: expected a finite number"),
        (["--retention", "0.5", "--schedule", "1:9"], "exclude each other"),
        (["--schedule", "one"], "schedule"),
        (["--actors", "0"], "--actors: must be at least 1"),
        (["--max-error-rate", "2"], "--max-error-rate: must be between 0 and 1"),
        (["--columns", "photo=x"], "ROLE=COLUMN"),
        (["--min-pixels", "0"], "--min-pixels: must be at least 1"),
        (["--max-pixels", "1e6"], "--max-pixels: expected a whole number"),
        (["--min-pixels", "9", "--max-pixels", "8"], "--min-pixels 9 is above --max-pixels 8"),
        (["--dtype", "int4"], "unknown dtype 'int4'; available: auto, float32, bfloat16, float16"),
        (["--row-timeout", "0"], "--row-timeout: must be between"),
        (["--repetition-penalty", "0"], "--repetition-penalty: must be above 0"),
        (["--repetition-penalty", "inf"], "--repetition-penalty: expected a finite number"),
        (["--no-repeat-ngram-size", "-1"], "--no-repeat-ngram-size: must be at least 0"),
        (["--min-p", "1.5"], "--min-p: must be between 0 and 1"),
        (["--remote-images-from", "https://a.org"], "needs --allow-remote-images"),
        (["--remote-images-from", "a.org/x"], "--remote-images-from: an origin is scheme://host"),
        (["--image-roots", "s3://bucket"], "--image-roots: expected a local directory"),
        (["--image-roots", "file://server/x"], "--image-roots: .* names the machine 'server'"),
        (["--retent", "0.5"], "unrecognized arguments"),
        (["--config", "/nowhere/run.yaml"], "cannot be read"),
        (["--output", "s3://key:secret@bucket/x"], "credentials"),
    ],
)
def test_flags_with_mistakes(flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_flags(*flags)


def test_only_settings_that_change_rows_are_results() -> None:
    base = JobConfig(retention=0.5)
    assert config.results(base) == config.results(base.replace(actors=4, output="x"))
    assert config.results(base) | {"seed": 1} == config.results(base.replace(seed=1))
    assert json.loads(json.dumps(config.results(base))) == config.results(base)


def test_nothing_is_pruned_where_nothing_is_asked() -> None:
    assert not JobConfig(method="none", retention=0.5).pruning().active
    assert not JobConfig(retention=1.0).pruning().active
    assert JobConfig(retention=0.5).pruning().active


def test_limits_on_the_size_of_images_change_rows(tmp_path: Path) -> None:
    got = from_flags("--min-pixels", "3136", "--max-pixels", "1003520")
    assert (got.min_pixels, got.max_pixels) == (3136, 1003520)
    assert got.image_policy() == ImagePolicy()
    (tmp_path / "run.yaml").write_text(config.dump(got))
    assert from_flags("--config", str(tmp_path / "run.yaml")) == got
    changed = config.results(JobConfig()) | {"min_pixels": 3136, "max_pixels": 1003520}
    assert config.results(got) == changed


def test_rules_of_decoding_change_rows_and_none_leaves_them_to_the_checkpoint(
    tmp_path: Path,
) -> None:
    names = ("top_p", "top_k", "min_p", "repetition_penalty", "no_repeat_ngram_size")
    assert JobConfig().sampling() == Sampling(max_new_tokens=64)
    flags = ["--repetition-penalty", "1.05", "--no-repeat-ngram-size", "3", "--min-p", "0.1"]
    got = from_flags(*flags, "--top-p", "1", "--top-k", "0", "--temperature", "0.5")
    sampling = got.sampling()
    assert [getattr(sampling, name) for name in names] == [1.0, 0, 0.1, 1.05, 3]
    (tmp_path / "run.yaml").write_text(config.dump(got))
    assert from_flags("--config", str(tmp_path / "run.yaml")) == got
    plain = config.results(JobConfig(temperature=0.5))
    assert {name for name, value in config.results(got).items() if plain[name] != value} == {*names}


def test_where_images_may_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--allow-remote-images", "--remote-images-from", "https://a.org", "s3://b"]
    flags += ["--image-roots", "photos", "file:///data/a%20b", "--row-timeout", "2.5"]
    first = from_flags(*flags, "--max-image-pixels", "1000")
    (tmp_path / "run.yaml").write_text(config.dump(first))
    monkeypatch.chdir("/")
    for policy in (first, from_flags("--config", str(tmp_path / "run.yaml"))):
        assert policy.image_policy() == ImagePolicy(
            max_pixels=1000,
            allow_remote=True,
            remote_from=("https://a.org", "s3://b"),
            roots=(str(tmp_path / "photos"), "/data/a b"),
            row_timeout=2.5,
        )
    assert from_flags().image_policy() == ImagePolicy()


def test_inputs_of_several_flags_add_up() -> None:
    assert from_flags("--input", "a", "b", "--input", "c").input == ("a", "b", "c")
