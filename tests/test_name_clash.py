"""Our `trio` beside the async library `trio`, the real one, in child processes of their own.

A child sees only a site directory that the test puts together: links to the installed libraries,
and our package in one of the ways it can get there. How we are installed around the tests plays no
part.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import trio

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = importlib.metadata.distribution("trio")
PACKAGES = Path(str(LIBRARY.locate_file("")))
SITES = ["wheel", "editable", "checkout"]
SUBMODULES = ["abc", "from_thread", "lowlevel", "socket", "testing", "to_thread"]

OURS = """
import trio, trio.errors
assert trio.Pruning(retention=1 / 9).retention == 1 / 9
assert issubclass(trio.errors.UserError, ValueError)
assert os.path.exists(os.path.join(trio.__path__[0], "_beside.py")), trio.__path__
"""
THEIRS = """
import anyio, httpx, pickle, sniffio, trio.testing
from trio.lowlevel import checkpoint

async def use():
    async with httpx.AsyncClient(transport=httpx.MockTransport(lambda _: httpx.Response(204))) as c:
        assert (await c.get("http://x/")).status_code == 204
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.sleep, 0)
        nursery.start_soon(anyio.sleep, 0)
    with trio.move_on_after(1):
        await checkpoint()
    return sniffio.current_async_library()

assert trio.run(use) == anyio.run(use, backend="trio") == "trio"
assert trio.run(use, clock=trio.testing.MockClock()) == "trio"
assert anyio.run(anyio.sleep, 0, backend="asyncio") is None
assert trio.TooSlowError.__module__ == "trio"
assert isinstance(pickle.loads(pickle.dumps(trio.TooSlowError())), trio.TooSlowError)
"""
GRANDCHILD = """
import subprocess
subprocess.run([sys.executable, *sys.argv[1:3], OURS + THEIRS], check=True)
"""


class Site:
    """One arrangement of installed packages, and the child processes that live in it."""

    def __init__(self, folder: Path, *, first: tuple[Path, ...] = ()) -> None:
        self.folder, self._first = folder, first
        folder.mkdir()

    def link(self, *, leave_out: tuple[str, ...] = ()) -> None:
        """Links every installed library; never our own files, nor other start-up hooks."""
        for entry in PACKAGES.iterdir():
            ours = entry.name.startswith(("trio_vlm", "_trio_vlm", "__pycache__"))
            if not ours and entry.suffix != ".pth" and entry.name not in leave_out:
                (self.folder / entry.name).symlink_to(entry)

    def unpack(self, wheel: Path) -> None:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(self.folder)

    def run(self, code: str, *, start: str = "") -> str:
        """Output of `code` in a Python that knows this site only; fails the test if it fails."""
        prelude = f"import os, site, sys\nsite.addsitedir({str(self.folder)!r})\n{start}\n"
        texts = f"OURS, THEIRS = {prelude + OURS!r}, {THEIRS!r}\n"
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        environment["PYTHONPATH"] = os.pathsep.join(map(str, self._first))
        done = subprocess.run(
            [sys.executable, "-S", "-P", "-c", texts + prelude + code, "-SP", "-c"],
            env=environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Our wheel and the one that an editable install uses, as the build backend makes them."""
    built = {}
    for kind, target in (("wheel", "wheel"), ("editable", "wheel:editable")):
        folder = tmp_path_factory.mktemp(kind)
        command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
        (built[kind],) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="session", params=SITES)
def site(
    request: pytest.FixtureRequest,
    wheels: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Site:
    """The async library and ours: from a wheel, an editable install, or just a path."""
    folder = tmp_path_factory.mktemp("site") / "site-packages"
    if request.param == "checkout":
        made = Site(folder, first=(ROOT,))
    else:
        made = Site(folder)
        made.unpack(wheels[request.param])
    made.link()
    return made


@pytest.fixture(scope="session")
def without_library(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Site:
    made = Site(tmp_path_factory.mktemp("alone") / "site-packages")
    made.unpack(wheels["wheel"])
    made.link(leave_out=("trio", f"trio-{LIBRARY.version}.dist-info"))
    return made


def test_both_users_in_one_process_and_in_its_child(site: Site) -> None:
    site.run(OURS + THEIRS + GRANDCHILD)


@pytest.mark.parametrize("site", ["wheel"], indirect=True)
def test_the_library_may_be_used_first(site: Site) -> None:
    site.run("import trio\n" + THEIRS + OURS)


def test_import_loads_nothing_of_the_library(site: Site) -> None:
    loaded = site.run(
        "import json, trio\n"
        "probes = [hasattr(trio, name) for name in ('__wrapped__', '__all__', '__signature__')]\n"
        "print(json.dumps([probes, sorted(sys.modules)]))"
    )
    probes, modules = json.loads(loaded)
    assert probes == [False, True, False]
    assert {name for name in modules if name.startswith("trio")} <= {
        "trio",
        "trio._beside",
        "trio_vlm_path",
    }
    assert not {"torch", "transformers", "ray", "attr", "outcome"} & set(modules)


@pytest.mark.parametrize(
    ("site", "name"),
    list(zip(SITES * 2, SUBMODULES, strict=True)),
    indirect=["site"],
    scope="session",
)
def test_any_submodule_may_come_first(site: Site, name: str) -> None:
    site.run(
        f"import trio.{name}\n"
        f"assert trio.{name} is sys.modules['trio.{name}']\n"
        f"assert trio.{name}.__spec__.origin.endswith('.py') and trio.run\n"
        f"from trio import {name}\n" + OURS
    )


def test_a_module_imported_first_is_loaded_once(site: Site) -> None:
    site.run("import trio._sync\nassert trio._sync.Event is trio.Event\n" + OURS)


def test_the_library_imported_before_us_is_adopted(site: Site) -> None:
    foreign = (
        "sys.meta_path[:] = [f for f in sys.meta_path if f.__module__ != 'trio_vlm_path'\n"
        "                    if hasattr(f, '__module__')]\n"
        f"sys.path[:] = [p for p in sys.path if p != {str(ROOT)!r}]\n"
        "import trio, trio.abc\n"
        "old = trio\n"
        f"sys.path.append({str(ROOT / 'jobs')!r})\n"
        "import _bootstrap\n"
    )
    site.run(
        foreign
        + OURS
        + "assert trio is not old and trio.run is old.run and trio.abc is old.abc\n"
        + "assert old.TooSlowError is trio.TooSlowError\n"
        + THEIRS
    )


def test_threads_that_need_it_at_once(site: Site) -> None:
    site.run(
        "import importlib, threading, trio\n"
        f"names = {SUBMODULES!r} * 3\n"
        "good, start = [], threading.Barrier(len(names))\n"
        "def use(name):\n"
        "    start.wait(20)\n"
        "    importlib.import_module('trio.' + name)\n"
        "    good.append((trio.Event, trio.run))\n"
        "def main():\n"
        "    threads = [threading.Thread(target=use, args=(n,), daemon=True) for n in names]\n"
        "    [t.start() for t in threads], [t.join(60) for t in threads]\n"
        "main()\n"
        "assert len(good) == len(names) and len(set(good)) == 1, good\n"
    )


def test_monkeypatching_reaches_the_librarys_users(site: Site) -> None:
    site.run(
        "import trio\nfrom unittest import mock\n"
        "async def fake(*_): return 7\n"
        "async def use(): return await trio.sleep(0)\n"
        "with mock.patch('trio.sleep', fake):\n"
        "    assert trio.run(use) == 7\n"
        "assert trio.run(use) is None\n"
    )


def test_without_the_library_its_probers_live(without_library: Site) -> None:
    without_library.run(
        OURS
        + "import anyio, httpx, httpcore\n"
        + "assert not hasattr(trio, 'run')\n"
        + "try: trio.run\n"
        + "except AttributeError as e: assert 'the async library' in str(e), e\n"
        + "async def use():\n"
        + "    transport = httpx.MockTransport(lambda _: httpx.Response(204))\n"
        + "    async with httpx.AsyncClient(transport=transport) as c:\n"
        + "        return (await c.get('http://x/')).status_code\n"
        + "assert anyio.run(use) == 204\n"
        + "try: import trio.lowlevel\n"
        + "except ModuleNotFoundError: pass\n"
        + "else: raise AssertionError\n"
    )


def test_a_library_that_fails_to_load_is_an_absent_attribute(
    without_library: Site, tmp_path: Path
) -> None:
    broken = tmp_path / "trio"
    broken.mkdir()
    (broken / "__init__.py").write_text("import no_such_module_anywhere\n")
    without_library.run(
        f"sys.path.append({str(tmp_path)!r})\n"
        "import trio\n"
        "assert not hasattr(trio, 'run')\n"
        "try: trio.run\n"
        "except AttributeError as e: assert 'no_such_module_anywhere' in str(e), e\n" + OURS
    )


def test_neither_installation_touches_the_others_files(wheels: dict[str, Path]) -> None:
    theirs = {str(path) for path in LIBRARY.files or ()}
    assert "trio/__init__.py" in theirs
    for wheel in wheels.values():
        ours = set(zipfile.ZipFile(wheel).namelist())
        assert "trio_vlm_path.pth" in ours
        assert not ours & theirs
        assert not any(name.startswith("trio/") for name in ours)


def test_the_wheel_holds_the_whole_package(wheels: dict[str, Path]) -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "trio"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert "trio/__init__.py" in tracked
    held = set(zipfile.ZipFile(wheels["wheel"]).namelist())
    wanted = {f"_trio_vlm/{name}" for name in tracked if (ROOT / name).exists()}
    # What trained the bundled model is for those who have the repository.
    training = {name for name in wanted if name.startswith("_trio_vlm/trio/demo/training/")}
    assert training and not training & held
    assert not wanted - training - held


def test_no_name_is_both_ours_and_theirs() -> None:
    theirs = {path.stem for path in (PACKAGES / "trio").iterdir()} - {"__init__", "__pycache__"}
    ours = {path.stem for path in (ROOT / "trio").iterdir()} - {"__init__", "__pycache__"}
    assert {"lowlevel", "abc"} <= theirs
    assert not ours & theirs
    source = (PACKAGES / "trio" / "__init__.py").read_text(encoding="utf-8")
    assert not [name for name in trio.__all__ if f" {name} as {name}" in source]


@pytest.mark.slow
def test_pytest_finds_ours_though_a_plugin_imported_the_other(tmp_path: Path) -> None:
    (tmp_path / "early_plugin.py").write_text(
        "import sys\n"
        "hide = [f for f in sys.meta_path if getattr(f, '__module__', '') == 'trio_vlm_path']\n"
        "[sys.meta_path.remove(f) for f in hide]\n"
        f"sys.path[:] = [p for p in sys.path if p != {str(ROOT)!r}]\n"
        "import trio\n"
        "assert trio.run and trio.__file__.endswith('trio/__init__.py')\n"
        "assert 'trio._beside' not in sys.modules\n"
    )
    options = ["-q", "-n0", "-p", "early_plugin", "-p", "no:cacheprovider", "-k", "public_name"]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", *options, "tests/test_imports.py"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_a_ray_worker_has_both() -> None:
    import ray

    @ray.remote
    def work() -> tuple[str, int, str]:
        import subprocess
        import sys

        import trio

        async def five() -> int:
            await trio.sleep(0)  # type: ignore[operator]
            return 5

        code = "import trio; print(trio.run(trio.sleep, 0), bool(trio.Pruning))"
        child = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        return trio.__file__, trio.run(five), child.stdout.strip()  # type: ignore[operator]

    file, five, child = ray.get(work.remote())
    assert Path(file) == ROOT / "trio" / "__init__.py"
    assert (five, child) == (5, "None True")
