"""The process in which a row's images are fetched and decoded: ``python -m`` this module.

INPUT messages (``frames``) with the parts of one row's image cell; OUTPUT for each the pixels of
its images or the row's error. Before each row an alarm is set that ends the process: that needs
neither a free GIL nor a living parent. The end of its input ends it too. Loads PIL, and Arrow only
for object stores.
"""

from __future__ import annotations

import os
import resource
import signal
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, BinaryIO

from PIL import Image

from trio.job import frames
from trio.job.images.image_files import NOTE, Part, images_of
from trio.job.images.policy import ImagePolicy, RowError

BYTES_PER_PIXEL = 48
# the dearest way to RGB: 16 bit by way of float64, with its intermediate results
PIPE_BYTES = STRIP_BYTES = 1 << 20
BASE_BYTES = 4 << 30
# of address space for libraries and the threads of object stores' clients


def main() -> None:
    """Serve until the input ends."""
    source, sink = _claim_pipes()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    warnings.simplefilter("ignore")
    _be_first_to_go()
    policy = ImagePolicy()
    with suppress(EOFError, BrokenPipeError):
        _send(sink, {"ready": True}, [])
        while True:
            header, buffers = frames.read(source)
            if "policy" in header:
                policy = _policy(header["policy"])
            signal.setitimer(signal.ITIMER_REAL, policy.row_timeout)
            answer, images = _answer(header, buffers, policy)
            signal.setitimer(signal.ITIMER_REAL, 0)
            del buffers
            _send(sink, answer, images)
            del images


def _claim_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Input and output for ourselves: what a library prints goes to standard error."""
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", PIPE_BYTES)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    return source, sink


def _be_first_to_go() -> None:
    """Where the machine's memory runs out, this process is taken and not the engine's."""
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


def _policy(values: dict[str, Any]) -> ImagePolicy:
    """The settings that were sent; memory is bounded by them, so that a bomb is a row's error."""
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    policy = ImagePolicy(**values | lists)
    Image.MAX_IMAGE_PIXELS = policy.max_pixels
    most = BASE_BYTES + BYTES_PER_PIXEL * policy.max_pixels + 2 * policy.max_bytes
    with suppress(ValueError, OSError):  # above the hard limit: that one holds then
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))
    return policy


def _answer(
    header: dict[str, Any], buffers: list[bytes], policy: ImagePolicy
) -> tuple[dict[str, Any], list[Image.Image]]:
    """Sizes and notes of a row's images and the images, or its error."""
    waiting = iter(buffers)
    parts: list[Part] = [next(waiting) if name is None else name for name in header["names"]]
    try:
        images = images_of(parts, header["base"], policy)
        notes = [image.info.get(NOTE) for image in images]
        return {"images": [image.size for image in images], "notes": notes}, images
    except RowError as error:
        return {"error": [error.kind, error.message]}, []
    except MemoryError:
        return {
            "error": ["image_oversized", "the row's images take more memory than the limit"]
        }, []
    except Exception as error:  # whatever an image does to a library is its row's own failure
        return {"error": ["image_unreadable", type(error).__name__]}, []


def _send(sink: BinaryIO, header: dict[str, Any], images: Sequence[Image.Image]) -> None:
    sizes = [3 * image.width * image.height for image in images]
    sink.write(frames.pack(header, sizes))
    for image in images:
        for strip in _strips(image):
            sink.write(strip)
    sink.flush()


def _strips(image: Image.Image) -> Iterator[bytes]:
    """Pixels in parts that the other side can read while the next ones are copied."""
    rows = max(1, STRIP_BYTES // (3 * image.width))
    if rows >= image.height:
        yield image.tobytes()
        return
    for top in range(0, image.height, rows):
        yield image.crop((0, top, image.width, min(top + rows, image.height))).tobytes()


if __name__ == "__main__":
    main()
    os._exit(0)  # nothing is left to do, and libraries' threads may not delay it
