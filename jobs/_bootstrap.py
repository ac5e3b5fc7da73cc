"""Makes `import trio` mean this checkout's package; the first import of every job and of the tests.

It also lets threads wait passively, which has to be said before torch is loaded.

An async I/O library of the same name may be installed, or even imported already (by a pytest plugin
or a sitecustomize). It is kept: whoever holds it goes on with it, and `trio.run` and the like are
found through our package (see trio/_beside.py).
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def adopt() -> None:
    """Puts the checkout first on sys.path and hands an async `trio` already imported to ours."""
    root = str(ROOT)
    if sys.path[:1] != [root]:
        sys.path.insert(0, root)
    if "trio" in sys.modules and "trio._beside" not in sys.modules:
        sys.modules["trio._async_library"] = sys.modules.pop("trio")


adopt()

import trio.passive  # noqa: E402, F401  # also before anything loads torch
