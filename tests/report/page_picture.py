"""The README's picture of a page: `python -m tests.report.page_picture OUT PICTURE.png`.

OUT is a run that `jobs/report.py` has made its page of, as the demo's.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from PIL import Image

from tests.report.browser import visit

WIDTH, HEIGHT = 1280, 1500
"""What is seen of the page, in pixels: its headline and the first answers."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="directory of the run")
    parser.add_argument("picture", type=Path, help="PNG file to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as room:
        whole = Path(room) / "whole.png"
        page = (options.output / "report.html").resolve()
        seen = visit(page, Path(room) / "browser", width=WIDTH, picture=whole)
        assert not seen.errors, seen.errors
        with Image.open(whole) as image:
            top = image.convert("RGB").crop((0, 0, WIDTH, HEIGHT))
    top.quantize(128, dither=Image.Dither.NONE).save(options.picture, optimize=True)


if __name__ == "__main__":
    main()
