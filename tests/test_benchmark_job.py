"""jobs/benchmark.py: what it says before it measures."""

from pathlib import Path

import benchmark
import pytest


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--json", "{dir}/nowhere/x.json"], "no file can be written there"),
        (["--json", "{dir}"], "no file can be written there"),
        (["--methods", "fastv"], "method must be one of"),
        (["--encoders", "scan"], "not available in this version"),
        (["--retention", "x"], "no list of numbers"),
        (["--seed", "-1"], "at least 0"),
        (["--scenes", "0"], "at least 1"),
        (["--frobnicate"], "unrecognized arguments"),
    ],
)
def test_mistakes_end_with_code_2_and_one_line(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark.main(["quality", *(flag.format(dir=tmp_path) for flag in flags)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("benchmark.py: ")


def test_a_dry_run_lists_what_would_be_measured(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--methods", "none,random,trio", "--retention", "1/3,1/9", "--position-ids", "keep"]
    assert benchmark.main(["quality", *flags, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "none, retention 1" and len(lines) == 6
    assert lines[-1] == "trio reference keep, retention 0.1111"
