"""Two million rows: bounded time, memory and size. The figures are printed (`-rP`)."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.report.made_runs import write_many
from tests.report.pages import Page, tiles_of

ROOT = Path(__file__).resolve().parents[2]
ROWS = 2_000_000
# What `getrusage` tells would begin with the memory of this process.
MEASURED = """
import sys
sys.path.insert(0, "jobs")
import report
code = report.main([sys.argv[1]])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
raise SystemExit(code)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_million_rows(tmp_path: Path) -> None:
    out = write_many(tmp_path, ROWS)
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(out)], cwd=ROOT, capture_output=True, text=True
    )
    seconds = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    gigabytes = int(done.stdout.split()[-1]) / 1e6
    page = out / "report.html"
    megabytes = page.stat().st_size / 1e6
    print(f"{ROWS} rows: {seconds:.1f} s, {gigabytes:.2f} GB, page {megabytes:.1f} MB")
    assert tiles_of(page.read_text())["Rows written"][0] == f"{ROWS:,}"
    assert "distributions" in Page.of(page).sections
    assert seconds < 60 and gigabytes < 1.5 and megabytes < 15
