"""Settings beside what the recorded command lines show: run.yaml, help, what decides the rows."""

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import caption
import pytest
import vqa
import yaml

from trio.engine.request import Sampling
from trio.errors import UserError
from trio.job import cli, command, run_yaml
from trio.job.command import Job
from trio.job.images.policy import ImagePolicy
from trio.job.settings import FIELDS, Settings, made_of
from trio.pruning.options import Pruning
from trio.pruning.pruning_config import PruningDefaults


def from_flags(*flags: str, hidden: Sequence[str] = ()) -> Settings:
    settings, dry_run = cli.read_call(flags, prog="caption.py", description="", hidden=hidden)
    assert not dry_run
    return settings


ALL = """--input a b --prompt "it's: a #1" --system-prompt s --columns image=jpg --limit 9
--keep-columns url,width --stop-repetition 4
--allow-remote-images --remote-images-from https://a.org s3://b --image-roots photos
--max-image-pixels 1000 --model org/name --revision main --dtype bfloat16 --min-pixels 9
--max-pixels 99 --text-tower org/clip --text-tower-revision main --adapters my_vl=my_module:Mine
--schedule 0:9 --method eadp --method-options beta=2.0 --encoder none --proxy-positions last
--proxy-layer previous
--proxy-head input_embedding --similarity-threshold 0.7 --fill-up reference --position-ids keep
--schedule-shape 0:0.2,5:0.12@16 --max-new-tokens 20 --temperature 0.7 --top-p 0.9 --top-k 50
--min-p 0.1 --repetition-penalty 1.05 --no-repeat-ngram-size 3 --seed 3 --output out
--rows-per-file 7 --file-mb 9 --push-to-hub org/rows --private --save-kept --gallery 9 --score exact
--compare 1,given,fastv:1/9 --mode likelihood
--preset chair --subset other --split val --pictures photos
--metric chair --objects objects.txt --group-by kind place --candidates Yes,No --with-eos
--normalise tokens --keep-if "p_first > 0.6" --address auto --actors 3
--gpus-per-actor 0.5 --cpus-per-actor 2 --wait-for-nodes 300 --prepare-cpus 4 --batch-tokens 4096
--max-running 32 --max-error-rate 0.1 --row-timeout 2.5 --stall-timeout 30 --grace-period 1
--log-interval 0.5"""
"""A value that is not the default for every setting that goes with the others."""
GROUPS = [
    *("input", "model", "pruning", "sampling", "structured"),
    *("questions", "output", "cluster", "limits"),
]
STRUCTURED = [name for name, one in FIELDS.items() if one.group == "structured"]
OTHERS = ["only_row", "audit", "min_agreement", "prompt_template", *STRUCTURED]
"""Which exclude --push-to-hub, --compare, --prompt, or each other and --mode likelihood."""
QUESTIONS = [name for name, one in FIELDS.items() if one.group == "questions"]
SINCE = ["prompt_template", "keep_columns", "stop_repetition", "subset", "split", "only_row"]
DECIDE_ROWS = json.loads(Path(__file__).with_name("recorded").joinpath("caption.json").read_text())[
    "decide_rows"
]


def test_every_flag_reaches_its_setting_and_run_yaml_gives_it_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given, usual = from_flags(*shlex.split(ALL)), Settings()
    changed = {name for name in FIELDS if given.get(name) != usual.get(name)}
    assert changed == FIELDS.keys() - {"retention", "encoder", "threads", *OTHERS}
    text = run_yaml.dump(given, "a comment")
    (tmp_path / "run.yaml").write_text(text)
    monkeypatch.chdir("/")
    assert from_flags("--config", str(tmp_path / "run.yaml")) == given
    assert text.startswith("# a comment\n") and yaml.safe_load(text).keys() == FIELDS.keys()
    assert json.loads(json.dumps(given.results())) == given.results()
    assert sorted(given.results()) == sorted(
        [*DECIDE_ROWS, "method_options", "compare", "audit", *QUESTIONS, *STRUCTURED, *SINCE]
    )
    assert given.input.image_roots == (str(tmp_path / "photos"),)
    assert given.pruning == Pruning(
        schedule="0:9",
        method="eadp",
        proxy_positions="last",
        proxy_layer="previous",
        proxy_head="input_embedding",
        similarity_threshold=0.7,
        fill_up="reference",
        position_ids="keep",
        schedule_shape="0:0.2,5:0.12@16",
        seed=3,
        method_options="beta=2.0",
    )
    assert given.image_policy() == ImagePolicy(
        max_pixels=1000,
        allow_remote=True,
        remote_from=("https://a.org", "s3://b"),
        roots=given.input.image_roots,
        row_timeout=2.5,
    )


def test_what_is_not_given_is_the_engines_own_default() -> None:
    usual = Settings()
    assert (usual.pruning, usual.sampling) == (Pruning(), Sampling())
    assert usual.image_policy() == ImagePolicy()
    filled = usual.with_pruning_defaults(PruningDefaults(choices={"fill_up": "reference"}))
    assert (filled.pruning.fill_up, filled.flat()["proxy_head"]) == ("reference", "output")
    assert filled.flat()["schedule_shape"] == "family" and usual.flat()["proxy_head"] is None


@pytest.mark.parametrize("job", [caption.JOB, vqa.JOB], ids=lambda job: job.name)
def test_the_help_tells_every_flag_with_its_unit_and_default(
    job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        from_flags("--help", hidden=job.hidden)
    text = capsys.readouterr().out
    assert "\x1b" not in text
    words = re.sub("[│|]", " ", text).split()
    others = {"prompt", "score"} if job.asks else set(QUESTIONS)
    flags = {setting.flag for setting in FIELDS.values()}
    hidden = {FIELDS[name].flag for name in others}
    assert flags & {word.rstrip(",") for word in words} == flags - hidden
    told = " ".join(words)
    assert "--row-timeout SECONDS For fetching and decoding" in told and "(default: 60.0)" in told
    assert "--method {trio,none," in told and "(default: trio)" in told
    titles = re.findall(r"^\W+(\w+) options ", text, re.MULTILINE)
    own = [title for title in GROUPS if job.asks or title != "questions"]
    assert titles == [*own, "research"]


def test_run_yaml_of_captions_holds_no_questions() -> None:
    values = yaml.safe_load(run_yaml.dump(from_flags()))
    assert values.keys() == FIELDS.keys() - set(QUESTIONS)


def test_captions_are_not_made_of_questions(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(run_yaml.dump(made_of(mode="generate", preset="pope")))
    config = from_flags("--config", str(tmp_path / "run.yaml"), hidden=caption.JOB.hidden)
    with pytest.raises(UserError, match=r"settings of vqa\.py: 'mode'"):
        command.resolve(caption.JOB, config)
    assert command.resolve(vqa.JOB, config).questions.mode == "generate"


@pytest.mark.parametrize(
    ("flags", "asked"),
    [
        ([], ("generate", "exact_match")),
        (["--metric", "none"], ("generate", None)),
        (["--preset", "pope"], ("generate", "pope")),
        (["--input", "mine.parquet"], ("generate", None)),
        (["--candidates", "Yes,No", "--mode", "likelihood"], ("likelihood", "exact_match")),
    ],
)
def test_questions_are_answered_unless_likelihoods_are_asked_for(
    flags: list[str], asked: tuple[str, str | None]
) -> None:
    settled = command.resolve(vqa.JOB, from_flags(*flags))
    assert (settled.questions.mode, settled.scored_by) == asked
    assert settled.output.score == "none" and settled.output.compare is None


@pytest.mark.parametrize(
    ("flags", "compared"),
    [
        ([], ["unpruned", "trio 1/9"]),
        (["--compare", "1,given"], ["unpruned", "trio 1/9"]),
        (["--retention", "1/3"], ["unpruned", "trio 1/3"]),
        (["--method", "fastv"], ["unpruned", "fastv 1/9"]),
        (["--compare", "1,1/2"], ["unpruned", "trio 1/2"]),
        (["--compare", "1/2,1", "--encoder", "visionzip"], ["visionzip + trio 1/2", "unpruned"]),
        (["--retention", "1"], None),
        (["--method", "none"], None),
        (["--input", "mine.parquet"], None),
        (["--input", "mine.parquet", "--compare", "1,given"], ["unpruned", "trio 1/9"]),
    ],
)
def test_the_bundled_shard_is_compared_unasked(
    flags: list[str], compared: list[str] | None
) -> None:
    settled = command.resolve(caption.JOB, from_flags(*flags))
    assert (settled.output.compare is not None) == (compared is not None)
    if compared is not None:
        assert [one.name for one in settled.compared] == compared
        assert command.resolve(caption.JOB, settled) == settled


@pytest.mark.parametrize("method", ["eadp", "cdpruner"])
def test_a_text_tower_is_needed_by_what_is_compared_too(method: str) -> None:
    flags = ["--compare", f"1,1/9,{method}:1/3"]
    assert command.resolve(caption.JOB, from_flags(*flags)).model.text_tower == "demo"
    with pytest.raises(UserError, match=f"^--method {method} compares images with prompts by CLIP"):
        command.resolve(caption.JOB, from_flags(*flags, "--model", "org/name"))
    with pytest.raises(UserError, match="method trio does not use it"):
        from_flags("--compare", "1,1/9", "--text-tower", "org/clip")


@pytest.mark.parametrize(
    ("written", "compare"), [("true", ("1", "given")), ("false", None), ("null", None)]
)
def test_a_comparison_of_earlier_versions(
    tmp_path: Path, written: str, compare: tuple[str, ...] | None
) -> None:
    (tmp_path / "run.yaml").write_text(f"compare_unpruned: {written}\nretention: 1/3")
    flags = ["--config", str(tmp_path / "run.yaml")]
    assert from_flags(*flags).output.compare == compare
    assert from_flags(*flags, "--compare", "1,given,1/9").output.compare == ("1", "given", "1/9")


@pytest.mark.parametrize("name", ["retention", "schedule"])
def test_what_is_pruned_is_said_once(name: str) -> None:
    flags = [f"--{name}", {"retention": "1/9", "schedule": "1:9"}[name], "--compare"]
    with pytest.raises(UserError, match=f"--{name} and --compare 1,1/3 exclude each other"):
        from_flags(*flags, "1,1/3")
    assert len(from_flags(*flags, "1,given,1/3").compared) == 3


@pytest.mark.parametrize(
    ("flags", "close"), [(["--retenshun", "0.5"], "--retention"), (["--config", "x"], "retention")]
)
def test_a_name_that_is_nearly_right(
    flags: list[str], close: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").write_text("retenshun: 0.5")
    with pytest.raises(UserError, match=rf"did you mean '{close}'\?"):
        from_flags(*flags)


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
    settled = command.resolve(caption.JOB, from_flags(*flags))
    assert settled.output.score == score == settled.results()["score"]


def test_nothing_is_pruned_where_nothing_is_asked() -> None:
    assert not made_of(method="none", retention=0.5).pruning.active
    assert not made_of(retention=1.0).pruning.active
    assert made_of(retention=0.5).pruning.active


def test_cpus_for_images_are_said_once() -> None:
    assert made_of(threads=2).cluster.threads == 2
    with pytest.raises(UserError, match="--threads and --prepare-cpus say the same"):
        from_flags("--threads", "2", "--prepare-cpus", "4")
