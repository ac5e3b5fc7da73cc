"""Images by way of another process: the same images, and rows that hang, crash or fill it."""

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.job.fakes import FakeEngine, encoded, png
from trio.engine.request import Request
from trio.job import frames, image_process
from trio.job.image_process import ImageProcess, NoImageProcess
from trio.job.images.image_files import load_images
from trio.job.images.policy import ImagePolicy, RowError
from trio.job.output.output_rows import ImageLoader
from trio.job.storage import locate
from trio.job.worker import EngineDied, EngineThread

ROOT = Path(__file__).resolve().parents[2]
POLICY = ImagePolicy(row_timeout=20.0)
TRAPS = """
import ctypes, os, signal
from trio.job.images import image_files

decode = images.decode

def trapped(data, policy):
    word = bytes(data[:5])
    if word == b"hang!":  # with the GIL held, as a decoder in C would
        ctypes.PyDLL(None).sleep(1000)
    if word == b"crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if word == b"once!" and not os.path.exists(data[5:]):
        open(data[5:], "w").close()
        os._exit(7)
    if word == b"large":
        bytearray(1 << 40)
    if word == b"print":
        print("noise", flush=True)
        os.write(1, b"more noise")
        data = data[5:]
    return decode(data, policy)

images.decode = trapped
"""


@pytest.fixture
def load() -> Iterator[ImageProcess]:
    process = ImageProcess()
    yield process
    process.close()


@pytest.fixture
def traps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoders in new processes obey some words."""
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sitecustomize.py").write_text(TRAPS)
    monkeypatch.syspath_prepend(tmp_path / "path")


def failure(load: ImageLoader, value: Any, policy: ImagePolicy = POLICY) -> RowError:
    with pytest.raises(RowError) as caught:
        load(value, None, policy)
    return caught.value


def pid_of(load: ImageProcess) -> int:
    assert load._child is not None
    return load._child.process.pid


def gone(pid: int) -> bool:
    """Whether a process has ended, be it as a zombie that nobody has asked for yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def soon(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_images_are_those_of_this_process(load: ImageProcess, tmp_path: Path) -> None:
    photo = encoded(Image.effect_noise((1300, 900), 80).convert("RGB"), "JPEG")
    (tmp_path / "ä.png").write_bytes(png((1, 2, 3)))
    base = locate(str(tmp_path))
    cells = [
        png(),
        photo,
        memoryview(photo),
        {"bytes": None, "path": "ä.png"},
        [png(), "ä.png", {"bytes": photo, "path": "no.jpg"}],
        [png()] * 700,
        encoded(Image.new("RGBA", (5, 5), (1, 2, 3, 4))),
        encoded(Image.effect_noise((40, 40), 90).convert("I;16")),
    ]
    for cell in cells:
        got, expected = load(cell, base, POLICY), load_images(cell, base, POLICY)
        assert [image.mode for image in got] == ["RGB"] * len(expected)
        assert [image.size for image in got] == [image.size for image in expected]
        assert [image.tobytes() for image in got] == [image.tobytes() for image in expected]
    first = pid_of(load)
    bad: list[Any] = [None, b"", b"junk", 17, "no.png", "/etc/hostname", [png(), None], [b"x"] * 2]
    for value in bad:
        one, other = failure(load, value), failure(load_images, value)
        assert str(one) == str(other)
    assert pid_of(load) == first
    assert failure(load, png(), ImagePolicy(max_pixels=9)).kind == "image_oversized"
    assert load(png(), None, POLICY)


@pytest.mark.usefixtures("traps")
def test_a_hanging_decoder_costs_its_row_the_limit(load: ImageProcess) -> None:
    policy = ImagePolicy(row_timeout=0.5)
    load(png(), None, policy)
    began = time.monotonic()
    error = failure(load, b"hang!", policy)
    assert time.monotonic() - began > 0.4
    assert error.kind == "image_timeout" and "0.5 s (--row-timeout)" in error.message
    assert load(png(), None, policy)[0].size == (12, 9)


@pytest.mark.usefixtures("traps")
def test_a_row_that_crashes_decoders(load: ImageProcess) -> None:
    error = failure(load, [png(), b"crash"])
    assert error.kind == "image_crashed" and "died 2 times, of SIGSEGV" in error.message
    assert load(png(), None, POLICY)


@pytest.mark.usefixtures("traps")
def test_a_decoder_that_dies_once_is_forgiven(load: ImageProcess, tmp_path: Path) -> None:
    mark = str(tmp_path / "mark").encode()
    assert "no known image format" in str(failure(load, b"once!" + mark))
    os.kill(pid_of(load), signal.SIGKILL)
    assert load(png(), None, POLICY)


@pytest.mark.usefixtures("traps")
def test_memory_has_a_limit(load: ImageProcess) -> None:
    error = failure(load, b"large")
    assert error.kind == "image_oversized" and "memory" in error.message
    assert load(png(), None, POLICY)


def test_an_answer_that_is_none_ends_its_process(
    load: ImageProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    def garbled(text: Any) -> Any:
        raise ValueError("not JSON")

    load(png(), None, POLICY)
    with monkeypatch.context() as patch:
        patch.setattr(frames, "parse", garbled)
        with pytest.raises(ValueError, match="not JSON"):
            load(png(size=(90, 90)), None, POLICY)
    assert load(png(), None, POLICY)[0].size == (12, 9)


@pytest.mark.usefixtures("traps")
def test_what_a_library_prints_is_no_answer(load: ImageProcess) -> None:
    assert load(b"print" + png(), None, POLICY)[0].size == (12, 9)
    assert load(png(), None, POLICY)


def test_a_process_that_does_not_move_is_given_up(
    load: ImageProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its alarm does not reach it while it is stopped."""
    monkeypatch.setattr(image_process, "GRACE_S", 0.3)
    policy = ImagePolicy(row_timeout=0.3)
    load(png(), None, policy)
    stopped = pid_of(load)
    os.kill(stopped, signal.SIGSTOP)
    assert failure(load, png(), policy).kind == "image_timeout"
    assert soon(lambda: gone(stopped))
    assert load(png(), None, policy)


def test_processes_that_do_not_start(
    load: ImageProcess, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for broken in ("/bin/false", str(tmp_path / "nowhere")):
        monkeypatch.setattr(sys, "executable", broken)
        with pytest.raises(NoImageProcess, match="no process for images can be started"):
            load(png(), None, POLICY)

    def row(load: ImageLoader) -> Request:
        return Request(prompt="x", images=tuple(load(png(), None, POLICY)))

    engine = EngineThread(FakeEngine, threads=2, ahead=4)
    with pytest.raises(EngineDied, match="no process for images"):
        engine.answer([row, row])
    engine.close()


def test_an_engine_thread_ends_its_processes() -> None:
    pids: set[int] = set()

    def row(load: ImageLoader) -> Request:
        images = load(png(), None, POLICY)
        assert isinstance(load, ImageProcess)
        pids.add(pid_of(load))
        return Request(prompt="x", images=tuple(images))

    engine = EngineThread(FakeEngine, threads=2, ahead=4)
    engine.answer([row] * 40)
    assert 1 <= len(pids) <= 2 and not any(map(gone, pids))
    engine.close()
    assert all(map(gone, pids))


@pytest.mark.parametrize("last", ["idle", "hang"])
def test_a_killed_parent_leaves_no_process_behind(last: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(TRAPS)
    script = (
        "import sys; from trio.job.image_process import ImageProcess\n"
        "from trio.job.images.policy import ImagePolicy\n"
        "load, policy = ImageProcess(), ImagePolicy(row_timeout=1.5)\n"
        f"load({png()!r}, None, policy)\n"
        "print(load._child.process.pid, flush=True)\n"
        "load(b'hang!', None, policy) if sys.argv[1] == 'hang' else sys.stdin.read()\n"
    )
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    parent = subprocess.Popen(
        [sys.executable, "-c", script, last],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": path},
        text=True,
    )
    assert parent.stdout is not None and parent.stdin is not None
    child = int(parent.stdout.readline())
    time.sleep(0.3)
    assert not gone(child)
    parent.kill()
    parent.wait()
    assert soon(lambda: gone(child))
    parent.stdout.close()
    parent.stdin.close()


def test_the_process_loads_little() -> None:
    code = (
        "import sys, trio.job.image_worker\n"
        "print({'torch', 'transformers', 'ray', 'pyarrow', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


def test_messages_come_back_and_an_end_is_noticed() -> None:
    header, buffers = {"names": [None, "é", None]}, [b"abc", b""]
    data = frames.pack(header, [len(b) for b in buffers]) + b"".join(buffers)
    stream = io.BytesIO(data * 2)
    for _ in range(2):
        got, back = frames.read(stream)
        assert got["names"] == header["names"] and back == buffers
    with pytest.raises(EOFError):
        frames.read(io.BytesIO(data[:-1]))


def test_it_waits_as_its_parent_does(load: ImageProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    load.start()
    assert load._child is not None
    given = Path(f"/proc/{load._child.process.pid}/environ").read_text().split("\0")
    assert "OMP_WAIT_POLICY=PASSIVE" in given
