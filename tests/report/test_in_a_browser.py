"""The page in a real browser: nothing is asked of the network, nothing complained of, nothing wider
than the window; the gallery works.

`REPORT_PICTURES=DIR` keeps pictures of all pages, to be looked at.
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.report.browser import CHROMIUM, visit
from tests.report.made_runs import EVIL, MadeRun
from tests.report.test_report_page import audited, begun, compared, empty, failed, finished, killed
from trio.report.report_command import write_page

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"needs {CHROMIUM}"),
]
WIDER = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
DRAWN = "document.querySelectorAll('.chart .main-svg').length > 0"


def pictures(tmp_path: Path, name: str) -> Path:
    place = Path(os.environ.get("REPORT_PICTURES", tmp_path))
    place.mkdir(parents=True, exist_ok=True)
    return place / f"{name}.png"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize(
    "make", [finished, compared, audited, empty, begun, killed, failed],
    ids=lambda make: make.__name__,
)  # fmt: skip
def test_a_page_is_at_peace(
    tmp_path: Path, make: Callable[[Path], MadeRun], width: int, dark: bool
) -> None:
    run = make(tmp_path)
    page = Path(write_page(str(run.path)))
    name = f"{make.__name__}-{width}-{'dark' if dark else 'light'}"
    back = "getComputedStyle(document.body).backgroundColor"
    seen = visit(
        page, tmp_path / "browser", width=width, dark=dark, asked=[WIDER, DRAWN, back],
        picture=pictures(tmp_path, name),
    )  # fmt: skip
    assert (seen.errors, seen.requests) == ([], [])
    wider, drawn, colour = seen.answers
    assert wider == 0 and drawn == bool(run.rows)
    assert colour == ("rgb(19, 20, 23)" if dark else "rgb(247, 246, 243)")


def test_the_gallery_shows_filters_and_fades(tmp_path: Path) -> None:
    run = compared(tmp_path)
    page = Path(write_page(str(run.path)))
    card = "[...document.querySelectorAll('.card')].find(c => c.textContent.includes('id-3'))"
    pixel = (
        f"(() => {{ const c = {card}.querySelector('canvas');"
        " return [...c.getContext('2d').getImageData(%d, %d, 1, 1).data].slice(0, 3) })()"
    )
    slide = (
        f"(() => {{ const s = {card}.querySelector('input[type=range]'); s.value = %d;"
        " s.dispatchEvent(new Event('input'));"
        f" return {card}.querySelector('output').textContent }})()"
    )
    press = (
        "(() => { [...document.querySelectorAll('#filters button')]"
        ".find(b => b.textContent.startsWith('%s')).click();"
        " return document.querySelectorAll('.card').length })()"
    )
    choose = (
        f"(() => {{ {card}.querySelectorAll('.answer .who')[%d].click();"
        f" return [{card}.querySelector('footer').textContent,"
        f" [...{card}.querySelectorAll('.answer')].findIndex(a => a.classList.contains('chosen'))]"
        " })()"
    )
    # The token in the upper left corner goes at the last stage; one by the spot stays.
    corner, spot = pixel % (20, 450), pixel % (280, 306)
    asked = [
        "document.querySelectorAll('.card').length",
        slide % 0, corner, spot, slide % 3, corner, spot,
        f"{card}.querySelector('.said').textContent",
        choose % 0, choose % 1,
        press % "Disagreements", press % "Errors", press % "All",
        "(() => { const f = document.getElementById('find'); f.value = 'number 7';"
        " f.dispatchEvent(new Event('input'));"
        " return document.querySelectorAll('.card').length })()",
    ]  # fmt: skip
    seen = visit(page, tmp_path / "browser", width=1280, asked=asked)
    assert (seen.errors, seen.requests) == ([], [])
    count, whole, before, spot_before, last, after, spot_after, said, *more = seen.answers
    (whole_told, first), (pruned_told, second), *numbers = more
    assert count == 12
    assert (
        whole == "image: 64 of 64 visual tokens" and last == "after stage 3: 6 of 64 visual tokens"
    )
    assert sum(after) < 0.5 * sum(before) and sum(spot_after) > 0.9 * sum(spot_before)
    assert said == EVIL
    assert (first, second) == (0, 1) and "100.0 % kept" in whole_told
    assert " % kept" in pruned_told and "100.0 % kept" not in pruned_told
    assert numbers == [2, 1, 12, 1]
