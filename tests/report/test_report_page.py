"""The page about runs in every state, as a browser's parser sees it."""

import dataclasses
import os
import re
import shlex
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import report

from tests.report.made_runs import EVIL, MadeRun, metrics_of, spoil
from tests.report.pages import Page, outside, tiles_of
from trio.job import cli
from trio.job.output.compaction import compact
from trio.job.resume import lease
from trio.job.resume.committed import listed
from trio.job.storage import locate
from trio.report.found_run import FoundRun, find_run
from trio.report.page import page_of

COMPARE = ("1", "given")


def finished(folder: Path) -> MadeRun:
    return MadeRun(folder).commit().gallery().close()


def compared(folder: Path) -> MadeRun:
    run = MadeRun(folder, compare=COMPARE, audit=None).commit().gallery()
    return run.close(metrics_of(run.names))


def audited(folder: Path) -> MadeRun:
    found = {
        "rate": 0.5, "rows": 12, "of_rows": 22, "not_auditable": 0, "seconds": 3.0,
        "agreement": {"value": 0.5, "interval": [0.3, 0.7], "rows": 12, "changed": 6},
        "noise_floor": {"value": 1.0, "interval": [0.8, 1.0], "rows": 4},
        "overlap": 0.9, "top1": 0.95, "kl": 0.01,
    }  # fmt: skip
    return MadeRun(folder, audit=0.5).commit().gallery().close(audit=found)


def empty(folder: Path) -> MadeRun:
    return MadeRun(folder, rows=0).commit().close()


def begun(folder: Path) -> MadeRun:
    return MadeRun(folder)


def killed(folder: Path) -> MadeRun:
    run = MadeRun(folder).commit(2).gallery(8).say(state="running")
    claim = run.path / ".lease" / "0123456789abcdef.claim"
    claim.parent.mkdir()
    claim.write_text("process 1 on far, started 2026")
    os.utime(claim, (0, 0))
    return run


def failed(folder: Path) -> MadeRun:
    return MadeRun(folder).commit(1).say(state="failed", why="engines <do> not start")


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the 4.7 MB of plotly, which take longest to parse."""
    monkeypatch.setattr("trio.report.page.get_plotlyjs", lambda: "let plotly;")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., MadeRun]:
    """A run that tests only read."""

    @cache
    def once(make: Callable[[Path], MadeRun]) -> MadeRun:
        return make(tmp_path_factory.mktemp(make.__name__))

    return once


RUNS: list[tuple[Callable[[Path], MadeRun], set[str], str]] = [
    (finished, {"speed", "distributions", "errors", "extremes"}, "finished"),
    (compared, {"trust", "speed", "distributions", "errors", "extremes"}, "finished"),
    (audited, {"trust", "speed", "distributions", "errors", "extremes"}, "finished"),
    (empty, set(), "finished"),
    (begun, set(), "stopped"),
    (killed, {"speed", "distributions", "errors", "extremes"}, "stopped"),
    (failed, {"speed", "distributions", "errors", "extremes"}, "failed"),
]


@pytest.mark.parametrize(
    ("make", "sections", "label"), RUNS, ids=lambda one: getattr(one, "__name__", "")
)
def test_every_kind_of_run_has_a_page_that_needs_nothing_else(
    made: Callable[..., MadeRun],
    make: Callable[[Path], MadeRun],
    sections: set[str],
    label: str,
) -> None:
    page = Page(page_of(str(made(make).path)))
    assert page.unclosed == [] and outside(page) == []
    assert page.sections - {""} == sections | {"gallery", "settings"}
    assert label in page.words
    scripts = [about for about, _ in page.scripts]
    assert scripts[0] == {"type": "application/json", "id": "data"}
    assert all(not about for about in scripts[1:]), "no script from elsewhere"
    assert [about for tag, about in page.elements if tag in ("img", "iframe", "object")] == []
    ids = [about["id"] for _, about in page.elements if about.get("id")]
    assert len(set(ids)) == len(ids)
    assert {f"chart-{key}" for key in page.data["charts"]} <= set(ids)
    policy = next(a["content"] for t, a in page.elements if a.get("http-equiv"))
    assert policy is not None and "default-src 'none'" in policy and "http" not in policy


def test_texts_of_models_and_users_stay_texts(made: Callable[..., MadeRun]) -> None:
    run = made(finished)
    text = page_of(str(run.path))
    assert EVIL not in text and "<b>at all" not in text and 'evil.example/x.png"' not in text
    page = Page(text)
    (card,) = [one for one in page.data["cards"] if one["id"] == "id-3"]
    assert card["answers"][0]["response"] == EVIL
    assert "image_invalid: not an image <b>at all</b>" in page.words
    assert EVIL in {" ".join(word.split()) for word in page.words} or EVIL in page.text


def test_the_headline_says_what_the_rows_add_up_to(made: Callable[..., MadeRun]) -> None:
    run = made(finished)
    good = [row for row in run.rows if row["error"] is None]
    html = page_of(str(run.path))
    tiles, text = tiles_of(html), Page(html).text
    assert tiles["Rows written"] == ("24", "of 24 input rows")
    assert tiles["Errors"][0] == "2" and "8.3 % of the rows" in tiles["Errors"][1]
    assert tiles["Images / s"][0] == f"{22 / 20:.2f}"
    kept = sum(row["retention"] for row in good) / len(good)
    assert tiles["Visual tokens kept"][0] == f"{100 * kept:.1f} %"
    # 4 + 2 GFLOP unpruned, 1 + 2 pruned.
    assert tiles["FLOPs of prompts"][0] == "2.0× fewer" and "4.0×" in tiles["FLOPs of prompts"][1]
    assert tiles["KV cache"] == ("4.0× fewer", "22 kB in all")
    assert "132 GFLOP instead of 66 GFLOP" in text and "88 kB instead of 22 kB" in text
    # 3 units of 0.5 s encoder, 1.5 s of prefill without choosing four times over, 4 s decode.
    assert "At most: engines would have worked 0:32 instead of 0:20" in text
    assert "Bottleneck: decode, 57 % of the engines' time." in text


def test_a_comparison_measures_what_unpruned_costs(made: Callable[..., MadeRun]) -> None:
    run = made(compared)
    text = page_of(str(run.path))
    page, tiles = Page(text), tiles_of(text)
    assert "Measured in this run: engines worked 0:20 on the unpruned setting" in page.text
    assert "Estimate" not in page.text
    assert tiles["FLOPs of prompts"][1].startswith("trio 1/4: ")
    for cell in (
        "97.5 % [93.0, 100.0]",
        "-2.1 [-5.0, +0.5]",
        "3 / 2",
        "75.0 % [60.0, 85.0]",
        "kind: rare",
    ):
        assert cell in page.words
    card = page.data["cards"][1]
    assert (card["kind"], len(card["answers"])) == ("disagreement", 2)
    assert [one["response"] for one in card["answers"]] == ["a cat, number 1", "a dog, number 1"]


def test_a_figure_of_an_own_scale_is_no_percentage(tmp_path: Path) -> None:
    run = MadeRun(tmp_path, compare=COMPARE).commit()
    metrics = metrics_of(run.names)
    for one in metrics["settings"]:
        one |= {"metric": "cider", "headline": "cider", "groups": {}}
        one["figures"] = {"cider": {"value": 0.934, "interval": [0.8, 1.05]}}
    run.close(metrics)
    tiles = tiles_of(page_of(str(run.path)))
    assert tiles["cider"] == ("0.934", "trio 1/4: 95 % interval 0.8 to 1.05")


def test_no_score_is_a_mean_over_settings(tmp_path: Path) -> None:
    run = MadeRun(tmp_path, compare=COMPARE).commit().close()
    scores = [row["score"] for row in run.rows if row["setting"] == 1 and row.get("score")]
    good = [row for row in run.rows if row["setting"] == 1 and row["error"] is None]
    value, note = tiles_of(page_of(str(run.path)))["Mean score"]
    assert value == f"{100 * sum(scores) / len(good):.1f} %"
    assert note == f"trio 1/4: of {len(good)} rows"


def test_an_audit_is_told_of(made: Callable[..., MadeRun]) -> None:
    page = Page(page_of(str(made(audited).path)))
    assert "50.0 % [30.0, 70.0]" in page.words and "0.0100 nats" in page.words
    cards = {one["id"]: one for one in page.data["cards"]}
    assert cards["id-1"]["kind"] == "disagreement"
    assert cards["id-1"]["answers"][0]["audit"] == "a cat, number 1"


def test_a_run_under_way_is_told_from_one_that_was_killed(tmp_path: Path) -> None:
    run = MadeRun(tmp_path).commit(1).say(state="running")
    with lease.hold(locate(str(run.path))):
        text = page_of(str(run.path))
        page = Page(text)
        assert "running" in page.words and "8 of 24 input rows (33.3 %)" in page.words
        assert tiles_of(text)["Rows written"] == ("8", "8 of 24 input rows done")
    page = Page(page_of(str(run.path)))
    assert "stopped" in page.words and "running" not in page.words
    assert f"--output {run.path}" in page.text and "go on with this run" in page.text.lower()


def test_a_failed_run_that_goes_on_is_running(tmp_path: Path) -> None:
    run = failed(tmp_path)
    with lease.hold(locate(str(run.path))):
        assert find_run(str(run.path)).state == "running"
    assert find_run(str(run.path)).state == "failed"


def test_what_would_replace_an_upload_says_so(tmp_path: Path) -> None:
    run = MadeRun(tmp_path, push_to_hub="me/data", audit=0.5, min_agreement=0.9).commit()
    page = Page(page_of(str(run.path)))
    assert "The whole run once more; it replaces the uploaded data set me/data" in page.words
    again = page.data["again"].replace("ROW", "3")
    settings, _ = cli.read_call(shlex.split(again.partition(".py ")[2]), prog="", description="")
    assert settings.output.push_to_hub is None and settings.limits.min_agreement is None


def test_why_a_run_failed_stands_on_top(made: Callable[..., MadeRun]) -> None:
    page = Page(page_of(str(made(failed).path)))
    assert any("engines <do> not start" in word for word in page.words)


def test_statistics_without_rows_count_for_nothing(tmp_path: Path) -> None:
    run = MadeRun(tmp_path).commit(2)
    sorted((run.path / "rows").iterdir())[1].unlink()
    assert tiles_of(page_of(str(run.path)))["Rows written"][0] == "8"


def test_files_that_were_put_together_are_read_where_they_lie(tmp_path: Path) -> None:
    run = MadeRun(tmp_path).commit()
    before = tiles_of(page_of(str(run.path)))
    compact(run.output, "run1", listed(run.output), 10**6)
    assert [path.name for path in (run.path / "rows").iterdir()] == ["0-00000.parquet"]
    assert tiles_of(page_of(str(run.path))) == before
    # A driver that died before the files had their place: readers find them below .larger/.
    hidden = run.path / ".larger" / "rows"
    hidden.mkdir(parents=True)
    (run.path / "rows" / "0-00000.parquet").rename(hidden / "0-00000.parquet")
    assert tiles_of(page_of(str(run.path))) == before


def test_files_that_go_meanwhile_are_looked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, looks = finished(tmp_path), []

    def find(place: str) -> FoundRun:
        looks.append(place)
        found = find_run(place)
        if len(looks) == 1:
            moved = [*found.rows, str(run.path / "rows" / "not-there.parquet")]
            return dataclasses.replace(found, rows=moved)
        return found

    monkeypatch.setattr("trio.report.page.find_run", find)
    assert tiles_of(page_of(str(run.path)))["Rows written"][0] == "24"
    assert len(looks) == 2


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda path: path / "none", "there is no such directory"),
        (lambda path: path, "no run lies there (it has no run.yaml)"),
        (lambda path: _file(path), "is a file; give the directory of a run"),
        (lambda path: _damaged(path), "run the job into a new --output"),
        (lambda path: _bad_page(path), "run the job into a new --output"),
        (lambda path: _no_text(path), "run.yaml is not text in UTF-8"),
    ],
    ids=["nowhere", "no-run", "file", "damaged", "bad-page", "no-text"],
)
def test_a_mistake_is_one_line(
    tmp_path: Path, make: Callable[[Path], Path], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main([str(make(tmp_path))]) == 2
    said = capsys.readouterr().err
    assert told in said and said.count("\n") == 1 and "Traceback" not in said


def _file(path: Path) -> Path:
    (path / "file").write_text("x")
    return path / "file"


def _damaged(path: Path) -> Path:
    run = finished(path)
    next((run.path / "rows").iterdir()).write_bytes(b"PAR1 and no more")
    return run.path


def _bad_page(path: Path) -> Path:
    run = finished(path)
    spoil(next((run.path / "stats").iterdir()))
    return run.path


def _no_text(path: Path) -> Path:
    run = finished(path)
    (run.path / "run.yaml").write_bytes(b"input: \xff\xfe")
    return run.path


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "give the directory of a run first"),
        (["--output", "x.html"], "give the directory of a run first"),
        (["OUT", "--outptu", "x"], "did you mean '--output'?"),
        (["nosuch://x"], "nosuch"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main(arguments) == 2
    assert told in capsys.readouterr().err


def test_the_whole_page_may_go_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.undo()
    run = finished(tmp_path)
    there = tmp_path / "pages" / "run.html"
    assert report.main([str(run.path), "--output", str(there)]) == 0
    assert capsys.readouterr().out == f"page: {there}\n"
    assert 4e6 < there.stat().st_size < 15e6 and not (run.path / "report.html").exists()
    page = Page.of(there)
    assert (page.unclosed, outside(page)) == ([], []) and len(page.scripts) == 3
    assert report.main([str(run.path), "--output", "/proc/none/x.html"]) == 2
    assert "give another --output" in capsys.readouterr().err


def test_commands_on_the_page_are_ones_that_the_jobs_take(made: Callable[..., MadeRun]) -> None:
    run = made(finished)
    page = Page(page_of(str(run.path)))
    commands = re.findall(r"^python jobs/(\w+)\.py (.*)$", page.text, re.MULTILINE)
    assert [name for name, _ in commands] == ["caption", "caption", "report"]
    again = page.data["again"].replace("ROW", str(run.rows[3]["row"]))
    flags = shlex.split(again.partition(".py ")[2])
    settings, _ = cli.read_call(flags, prog="", description="", hidden=("questions",))
    assert settings.input.only_row == run.rows[3]["row"] and settings.output.output == "NEW"
    assert settings.pruning.retention == 0.25
