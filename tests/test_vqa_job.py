"""jobs/vqa.py from its arguments to its figures: the demo model's own answers about scenes that its
training never saw, and `metrics.json` beside a computation of its own."""

import datetime
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
import vqa
import yaml

from tests.plain_figures import (
    Figure,
    calibration_bins,
    drawn,
    fault,
    is_middle,
    likelihoods,
    pope,
    share,
    vqa_accuracy,
)
from tests.vqa_scenes import (
    Truth,
    write_choices,
    write_joined,
    write_ten_answers,
    write_yes_or_no,
)
from trio.job.command import main
from trio.job.output.totals import from_pairs

ROOT = Path(__file__).resolve().parents[1]
UNPRUNED = ["--retention", "1", "--method", "none"]
FEW = 16
"""Rows of a file."""
COUNTS = [
    pytest.param(FEW, marks=pytest.mark.slow),
    pytest.param(600, marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
]
Row = dict[str, Any]


def run(*flags: str) -> int:
    return main(vqa.JOB, [*flags, "--log-interval", "60"])


def preset(path: Path, **keys: Any) -> list[str]:
    """The flag of a preset that asks in the model's own words."""
    path.write_text(yaml.safe_dump({"id": "id", "prompt": "{question}", **keys}))
    return ["--preset", str(path)]


def rows_of(output: Path) -> list[Row]:
    return list(pq.read_table(output / "rows").to_pylist())


def json_of(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


def answered(output: Path, truth: Truth, setting: int = 0) -> list[tuple[str, str, Row]]:
    """Picture, what was said, and the truth of each row, none of which failed."""
    rows = [row for row in rows_of(output) if row["setting"] == setting]
    assert sorted(row["id"] for row in rows) == sorted(truth)
    assert all(row["error"] is None for row in rows)
    assert all(row["prompt"] == truth[row["id"]]["question"] for row in rows)
    return [
        (truth[row["id"]]["picture"], row["prediction"], {**truth[row["id"]], "row": row})
        for row in rows
    ]


def check_counts(one: Mapping[str, Any], truth: Truth, metric: str) -> None:
    pictures = {row["picture"] for row in truth.values()}
    counts = {"rows": len(truth), "answered": len(truth), "failed": 0, "error_kinds": {}}
    counts |= {"without_truth": 0, "pictures": len(pictures), "metric": metric}
    counts |= {"figures_failed_as_wrong": None}
    assert {name: one[name] for name in counts} == counts


def check_figures(found: Mapping[str, Any], expected: Mapping[str, Figure]) -> None:
    assert found.keys() == expected.keys()
    faults = {name: fault(found[name], figure) for name, figure in expected.items()}
    assert not any(faults.values()), faults


def check_score(found: Figure, least: float) -> None:
    print(f"share right {found.value:.4f}")
    assert found.value >= least


def pope_figures(said: Sequence[tuple[str, str, Row]]) -> dict[str, Figure]:
    """Shares of rows by Wilson, means over categories and F1 by a bootstrap."""
    rows = [
        (picture, (answer == "yes", true["answer"] == "yes", true["category"]))
        for picture, answer, true in said
    ]
    values = pope([row for _, row in rows])
    shares: dict[str, list[tuple[float, str]]] = {
        "unparsed": [(float(answer not in ("yes", "no")), picture) for picture, answer, _ in said]
    }
    for picture, (yes, true, category) in rows:
        for name, is_in, hit in (
            ("accuracy", True, yes == true),
            ("precision", yes, true),
            ("recall", true, yes),
            ("yes_ratio", True, yes),
        ):
            own = shares.setdefault(f"{category}/{name}", [])
            own += [(float(hit), picture)] * is_in
    draws = drawn(rows, pope)
    others = {
        name: Figure(value, "bootstrap", draws=[each.get(name, 0.0) for each in draws])
        for name, value in values.items()
        if name not in shares
    }
    return others | {name: share(hits) for name, hits in shares.items()}


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("count", COUNTS)
def test_yes_or_no_as_pope(tmp_path: Path, count: int, capsys: pytest.CaptureFixture[str]) -> None:
    truth = write_yes_or_no(tmp_path / "in.parquet", count)
    fields = {"answer": "answer", "category": "category"}
    flags = preset(tmp_path / "p.yaml", fields=fields, metric="pope")
    flags += ["--input", str(tmp_path / "in.parquet"), "--output", str(tmp_path / "out")]
    assert run(*flags, *UNPRUNED) == 0
    said = answered(tmp_path / "out", truth)
    metrics = json_of(tmp_path / "out" / "metrics.json")
    (one,) = metrics["settings"]
    assert (metrics["mode"], one["headline"], one["retention"]) == ("generate", "accuracy", 1.0)
    check_counts(one, truth, "pope")
    expected = pope_figures(said)
    check_figures(one["figures"], expected)
    check_score(expected["accuracy"], 0.9)
    assert {row["answer"] for row in truth.values()} == {"yes", "no"}
    if count == FEW:
        capsys.readouterr()
        assert run(*flags, *UNPRUNED, "--prompt-template", "{question} please") == 2
        told = capsys.readouterr().err
        assert "holds a run that differs in this: prompt_template: " in told


def scored_unpruned(
    folder: Path, fields: Mapping[str, str], metric: str, *more: str
) -> dict[str, Any]:
    """What `metrics.json` says of `in.parquet` in a folder, whose `out` the run is."""
    flags = preset(folder / "p.yaml", fields=fields, metric=metric)
    flags += ["--input", str(folder / "in.parquet"), "--output", str(folder / "out")]
    assert run(*flags, *UNPRUNED, *more) == 0
    (one,) = json_of(folder / "out" / "metrics.json")["settings"]
    found: dict[str, Any] = one
    return found


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("count", COUNTS)
def test_ten_answers_as_vqav2(tmp_path: Path, count: int) -> None:
    truth = write_ten_answers(tmp_path / "in.parquet", count)
    fields = {"answers": "answers[].answer", "question_type": "question_type"}
    one = scored_unpruned(tmp_path, fields, "vqav2")
    check_counts(one, truth, "vqav2")
    hits: dict[str, list[tuple[float, str]]] = {}
    for picture, answer, true in answered(tmp_path / "out", truth):
        right = vqa_accuracy(answer, [each["answer"] for each in true["answers"]])
        assert true["row"]["score"] == right
        for name in ("accuracy", f"question_type/{true['question_type']}"):
            hits.setdefault(name, []).append((right, picture))
    expected = {name: share(own) for name, own in hits.items()}
    check_figures(one["figures"], expected)
    check_score(expected["accuracy"], 0.9)


def is_answered_by(value: str, true: Row) -> bool:
    return bool(true["answer"] == value)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("count", COUNTS)
def test_joined_pictures_as_gqa_in_groups(tmp_path: Path, count: int) -> None:
    pictures = tmp_path / "pictures.parquet"
    truth = write_joined(tmp_path / "in.parquet", pictures, count)
    join = {"config": "pictures", "key": "id", "by": "imageId"}
    fields = {"answer": "answer", "structural": "types.structural"}
    flags = preset(tmp_path / "p.yaml", fields=fields, metric="gqa", images=join)
    flags += ["--input", str(tmp_path / "in.parquet"), "--output", str(tmp_path / "out")]
    flags += ["--pictures", str(pictures), "--group-by", "answer"]
    assert run(*flags, *UNPRUNED) == 0
    (one,) = json_of(tmp_path / "out" / "metrics.json")["settings"]
    check_counts(one, truth, "gqa")
    said = answered(tmp_path / "out", truth)

    def figures(of: Callable[[Row], bool]) -> dict[str, Figure]:
        hits: dict[str, list[tuple[float, str]]] = {"accuracy": [], "binary": [], "open": []}
        for picture, answer, true in filter(lambda each: of(each[2]), said):
            right = float(answer == true["answer"])
            part = "open" if true["types"]["structural"] == "query" else "binary"
            for name in ("accuracy", part):
                hits[name].append((right, picture))
        return {name: share(own) for name, own in hits.items()}

    expected = figures(lambda true: True)
    check_figures(one["figures"], expected)
    check_score(expected["accuracy"], 0.9)
    groups = one["groups"]["answer"]
    assert groups.keys() == {true["answer"] for true in truth.values()} and len(groups) > 5
    for value, group in groups.items():
        own = [true for true in truth.values() if true["answer"] == value]
        assert (group["n"], group["pictures"]) == (len(own), len({row["picture"] for row in own}))
        check_figures(group["figures"], figures(partial(is_answered_by, value)))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("count", COUNTS)
def test_words_to_choose_among_by_likelihood(tmp_path: Path, count: int) -> None:
    truth = write_choices(tmp_path / "in.parquet", count)
    fields = {"choices": "choices[]", "answer": "answer"}
    one = scored_unpruned(tmp_path, fields, "multiple_choice", "--mode", "likelihood")
    check_counts(one, truth, "multiple_choice")
    hits, sure = [], []
    for picture, answer, true in answered(tmp_path / "out", truth):
        row = true["row"]
        assert row["choices"] == true["choices"] and row["response"] == answer
        assert row["finish_reason"] == "scored"
        right = answer == true["choices"][true["answer"]]
        assert row["score"] == right
        hits.append((float(right), picture))
        sure.append((max(row["p_choice"]), right))
    expected = {"accuracy": share(hits), "unparsed": share([(0.0, of) for _, of in hits])}
    check_figures(one["figures"], expected)
    check_score(expected["accuracy"], 0.8)
    calibration = one["calibration"]
    assert calibration["n"] == count
    assert calibration["ece"] == pytest.approx(calibration_bins(sure, len(calibration["bins"])))


COMPARED = ("1", "1/3", "2/9", "1/9")
NAMES = ("unpruned", "trio 1/3", "trio 2/9", "trio 1/9")


def scores(output: Path, setting: int) -> dict[str, tuple[float, str]]:
    """Score and answer by id."""
    own = [row for row in rows_of(output) if row["setting"] == setting]
    return {row["id"]: (row["score"], row["prediction"]) for row in own}


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize(
    ("count", "alone"),
    [
        (24, []),
        pytest.param(300, [*COMPARED], marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
    ],
)
def test_settings_compared_in_one_run(tmp_path: Path, count: int, alone: Sequence[str]) -> None:
    """Each answers as in a run of its own, over pictures that were encoded once."""
    truth = write_yes_or_no(tmp_path / "in.parquet", count, seed=5)
    fields = {"answer": "answer", "category": "category"}
    flags = preset(tmp_path / "p.yaml", fields=fields, metric="pope")
    flags += ["--input", str(tmp_path / "in.parquet"), "--rows-per-file", "10"]
    out = tmp_path / "out"
    assert run(*flags, "--output", str(out), "--compare", ",".join(COMPARED)) == 0
    keys = [(row["row"], row["prompt_number"], row["setting"]) for row in rows_of(out)]
    assert keys == [(n, 0, setting) for n in range(count) for setting in range(len(COMPARED))]

    summary, metrics = json_of(out / "summary.json"), json_of(out / "metrics.json")
    pictures = {one["picture"] for one in truth.values()}
    assert sum(one["images_encoded"] for one in summary["settings"]) == len(pictures)
    assert [one["images"] for one in summary["settings"]] == [count] * len(COMPARED)
    assert tuple(one["name"] for one in metrics["settings"]) == NAMES
    before = scores(out, 0)
    for number, one in enumerate(metrics["settings"]):
        check_counts(one, truth, "pope")
        said = answered(out, truth, number)
        check_figures(one["figures"], pope_figures(said))
        if number:
            check_comparison(one["comparison"], before, scores(out, number), truth)
        assert ("comparison" in one) == (number > 0)
    for item in alone:
        own = tmp_path / item.replace("/", "-")
        assert run(*flags, "--output", str(own), "--retention", item) == 0
        assert scores(own, 0) == scores(out, COMPARED.index(item))


def check_comparison(
    found: Mapping[str, Any],
    before: Mapping[str, tuple[float, str]],
    after: Mapping[str, tuple[float, str]],
    truth: Truth,
) -> None:
    pairs = [(truth[name]["picture"], (before[name][0], after[name][0])) for name in truth]
    same = [(float(before[name][1] == after[name][1]), truth[name]["picture"]) for name in truth]
    headline, sums = found["headline"], [sum(pair[n] for _, pair in pairs) for n in (0, 1)]
    n = len(pairs)
    assert (found["n"], found["left_out"], found["without_truth"]) == (n, 0, 0)
    assert headline["of"] == "rows" and headline["n"] == n
    assert headline["pictures"] == len({picture for picture, _ in pairs})
    assert headline["unpruned"] == pytest.approx(sums[0] / n)
    assert headline["pruned"] == pytest.approx(sums[1] / n)
    assert headline["relative"] == pytest.approx(sums[1] / sums[0])
    assert headline["difference_points"] == pytest.approx(100 * (sums[1] - sums[0]) / n)
    assert headline["only_unpruned"] == [pair for _, pair in pairs].count((1, 0))
    assert headline["only_pruned"] == [pair for _, pair in pairs].count((0, 1))
    assert fault(found["agreement"], share(same)) is None
    low, high = headline["relative_interval"]
    assert low <= headline["relative"] <= high
    changed = {picture for picture, (x, y) in pairs if x != y}
    assert headline["few_changes"] == (len(changed) < 10)
    if headline["few_changes"]:
        assert headline["interval_by"] == "wilson"
        return
    assert headline["interval_by"] == "bootstrap"
    assert is_middle((low, high), drawn(pairs, relative))


def relative(pairs: Sequence[tuple[float, float]]) -> float:
    return sum(after for _, after in pairs) / sum(before for before, _ in pairs)


OF_A_SETTING = ("rows", "errors", "images", "prompt_tokens", "output_tokens", "visual_tokens",
                "accuracy", "scored")  # fmt: skip


def sums_of(output: Path) -> list[dict[str, float]]:
    """Of each setting, over all units."""
    stats = pq.read_table(output / "stats").to_pylist()
    names = ("rows", "errors", "images", "prompt_tokens", "output_tokens", "scored", "score_sum")
    return [
        {name: math.fsum(row[name] for row in stats if row["setting"] == setting) for name in names}
        for setting in sorted({row["setting"] for row in stats})
    ]


def figures_of(output: Path) -> list[dict[str, Any]]:
    """`metrics.json` without the run's id and how fast it was."""
    settings: list[dict[str, Any]] = json_of(output / "metrics.json")["settings"]
    return [{name: one[name] for name in one if name != "images_per_s"} for one in settings]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize(
    ("count", "kill_at"),
    [
        pytest.param(30, [2], marks=[pytest.mark.chaos, pytest.mark.timeout(600)]),
        pytest.param(90, [3, 25, 50], marks=[pytest.mark.chaos, pytest.mark.timeout(1200)]),
    ],
)
def test_killed_and_resumed_with_three_settings(
    tmp_path: Path, count: int, kill_at: Sequence[int]
) -> None:
    """By SIGKILL, when so many units are committed."""
    write_yes_or_no(tmp_path / "in.parquet", count, seed=6)
    fields = {"answer": "answer", "category": "category"}
    flags = preset(tmp_path / "p.yaml", fields=fields, metric="pope")
    flags += ["--input", str(tmp_path / "in.parquet"), "--compare", "1,1/3,1/9"]
    # More units than are under way at once, whose files stay.
    flags += ["--rows-per-file", "1", "--file-mb", "0"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, str(ROOT / "jobs" / "vqa.py"), *flags, "--output", str(killed)]
    for units in kill_at:
        with (tmp_path / "log").open("wb") as log:
            job = subprocess.Popen([*command, "--address", address], stdout=log, stderr=log)
        while job.poll() is None and len(list((killed / "rows").glob("*.parquet"))) < units:
            time.sleep(0.01)
        assert job.poll() is None, (tmp_path / "log").read_text()
        job.kill()
        job.wait()
    ended = datetime.datetime.now(datetime.UTC)
    kept = {path: path.stat().st_mtime_ns for path in (killed / "rows").glob("*.parquet")}
    assert max(kill_at) <= len(kept) < count and not (killed / "metrics.json").exists()
    for output in (killed, whole):
        assert run(*flags, "--output", str(output)) == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    keys = [(row["row"], row["prompt_number"], row["setting"]) for row in rows_of(killed)]
    assert keys == [(n, 0, setting) for n in range(count) for setting in range(3)]
    assert {row["finished_at"] < ended for row in rows_of(killed)} == {True, False}
    assert figures_of(killed) == figures_of(whole)
    assert sums_of(killed) == sums_of(whole) and len(sums_of(killed)) == 3
    one, other = (json_of(output / "summary.json")["settings"] for output in (killed, whole))
    for before, after in zip(one, other, strict=True):
        assert {name: before[name] for name in OF_A_SETTING} == {
            name: after[name] for name in OF_A_SETTING
        }


def in_half(figures: Mapping[str, Any]) -> bool:
    return bool(figures["p_first"] > 0.5 and not figures["margin"] < 1)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("by_tokens", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_likelihoods_of_each_row(tmp_path: Path, by_tokens: bool) -> None:
    """Of choices of several lengths, their ends included or not."""
    truth = write_choices(tmp_path / "in.parquet", 8)
    table = pq.read_table(tmp_path / "in.parquet")
    longer = [[*row, f"a {row[0]} 3"] for row in table["choices"].to_pylist()]
    place = table.schema.get_field_index("choices")
    pq.write_table(table.set_column(place, "choices", [longer]), tmp_path / "in.parquet")
    flags = ["--input", str(tmp_path / "in.parquet"), "--mode", "likelihood"]
    flags += ["--metric", "multiple_choice", "--group-by", "answer", *UNPRUNED]
    flags += ["--keep-if", "p_first > 0.5 and not margin < 1"]
    also = ["--with-eos", "--normalise", "tokens"] if by_tokens else []
    assert run(*flags, *also, "--output", str(tmp_path / "out")) == 0
    kept = []
    for row in rows_of(tmp_path / "out"):
        words = [len(choice.split()) for choice in row["choices"]]
        assert words == [1, 1, 1, 1, 3]
        assert row["choice_tokens"] == [count + by_tokens for count in words]
        assert max(row["choice_logprobs"]) <= 0 and row["response"] == row["prediction"]
        told = likelihoods(row["choice_logprobs"], row["choice_tokens"], by_tokens=by_tokens)
        assert row["prediction"] == row["choices"][int(told["best"])]  # type: ignore[arg-type]
        for name in ("p_choice", "p_first", "margin"):
            assert row[name] == pytest.approx(told[name], rel=1e-9)
        assert math.fsum(row["p_choice"]) == pytest.approx(1)
        assert row["keep"] == in_half(row)
        assert from_pairs(row["groups"]) == {"answer": str(truth[row["id"]]["answer"])}
        kept.append(row["keep"])
    assert {True, False} == set(kept)
    (one,) = json_of(tmp_path / "out" / "metrics.json")["settings"]
    answers = [str(true["answer"]) for true in truth.values()]
    assert {value: group["n"] for value, group in one["groups"]["answer"].items()} == {
        value: answers.count(value) for value in answers
    }
    about = {"normalise": "tokens" if by_tokens else "sum", "with_eos": by_tokens}
    assert one["about"].items() >= about.items()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_candidates_that_are_the_same_for_all_rows(tmp_path: Path) -> None:
    truth = write_yes_or_no(tmp_path / "in.parquet", 8)
    flags = ["--input", str(tmp_path / "in.parquet"), "--output", str(tmp_path / "out")]
    flags += ["--mode", "likelihood", "--candidates", "Yes,No", *UNPRUNED]
    assert run(*flags, "--metric", "pope", "--keep-if", "p_first > 0.5") == 0
    for row in rows_of(tmp_path / "out"):
        true = truth[row["id"]]
        assert row["choices"] == ["Yes", "No"] and row["prompt"] == true["question"]
        told = likelihoods(row["choice_logprobs"], row["choice_tokens"], by_tokens=False)
        for name in ("p_choice", "p_first", "margin"):
            assert row[name] == pytest.approx(told[name], rel=1e-9)
        assert row["prediction"] == ("Yes" if row["p_choice"][0] > 0.5 else "No")
        assert row["keep"] == (row["p_first"] > 0.5)
        # The words are the model's own, so what it finds likelier is right.
        assert row["prediction"].lower() == true["answer"]
    assert {row["keep"] for row in rows_of(tmp_path / "out")} == {True, False}


MISTAKES = [
    (["--prompt-template", "{colour} ?"], "no column 'colour'; it has id, question, answer"),
    (["--metric", "vqav2"], "--metric vqav2 needs a column 'answers'; the input has id"),
    (["--metric", "pop"], "pop"),
    (["--candidates", "Yes,No"], "--candidates is for --mode likelihood"),
    (["--normalise", "tokens"], "--normalise is for --mode likelihood"),
    (["--with-eos"], "--with-eos is for --mode likelihood"),
    (["--mode", "likelihood", "--candidates", "Yes"], "give two or more different answers"),
    (["--preset", "popes"], "unknown preset 'popes' (did you mean 'pope'?)"),
    (["--preset", "vqav2"], "preset 'vqav2' needs 'answer_type', 'answers'"),
    (["--mode", "likelihood"], "--mode likelihood needs a column 'choices'"),
    (["--metric", "chair"], "metric chair needs --objects FILE"),
    (["--keep-if", "p_first > 0.5"], "there is no p_first with --mode generate"),
    (["--keep-if", "score >"], "is no condition"),
    (["--split", "val"], "--split val: no input here has such parts"),
    (["--group-by", "colour"], "no column 'colour'"),
    (["--pictures", "p.parquet"], "--pictures needs --preset"),
    (["--preset", "gqa"], "its pictures lie in files of their own"),
    (["--compare", "1/3,1/9"], "1 (the unpruned model)"),
]


@pytest.mark.parametrize(("flags", "message"), MISTAKES)
def test_mistakes_end_with_code_2_and_one_line(
    flags: Sequence[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_yes_or_no(tmp_path / "in.parquet", 2)
    given = ["--input", str(tmp_path / "in.parquet"), "--output", str(tmp_path / "out")]
    assert main(vqa.JOB, [*given, *flags]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1
    assert captured.err.startswith("vqa.py: ") and "Traceback" not in captured.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.parquet"]
