"""A real browser without a window, asked through its own protocol: what a page looks like, what it
complains of, and what it asks the network for."""

from __future__ import annotations

import asyncio
import base64
import itertools
import os
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
    "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars", "--remote-debugging-port=0",
)  # fmt: skip
STARTED_S, LOADED_S, DRAWN_S = 60.0, 60.0, 1.5


@dataclass(kw_only=True)
class Seen:
    """Of one visit."""

    errors: list[str] = field(default_factory=list)
    """Of the console, and exceptions."""
    requests: list[str] = field(default_factory=list)
    """But for the file itself and what is in it."""
    answers: list[Any] = field(default_factory=list)
    """Of what was asked of the page, in order."""


def visit(
    page: Path, room: Path, *, width: int, dark: bool = False, asked: Sequence[str] = (),
    picture: Path | None = None,
) -> Seen:  # fmt: skip
    """Open a page and look.

    Args:
        page: the file.
        room: a directory of the browser's own.
        width: of the window, in pixels; below 500 it is a phone's.
        dark: whether the reader prefers that.
        asked: expressions of JavaScript, evaluated one after the other once it is drawn.
        picture: where a picture of the whole page goes, as it is then.
    """
    process = subprocess.Popen(
        [CHROMIUM, *FLAGS, f"--user-data-dir={room}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        return asyncio.run(_visit(page, room, width, dark, asked, picture))
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # its children write to the room as well
        process.wait()


async def _visit(
    page: Path, room: Path, width: int, dark: bool, asked: Sequence[str], picture: Path | None
) -> Seen:
    address = await _address(room)
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(address, max_msg_size=1 << 28) as socket,
    ):
        seen, numbers, session_id = Seen(), itertools.count(1), None
        loaded = asyncio.Event()
        waiting: dict[int, asyncio.Future[Any]] = {}

        async def listen() -> None:
            async for message in socket:
                told = message.json()
                if "id" in told:
                    waiting.pop(told["id"]).set_result(told)
                elif told["method"] == "Page.loadEventFired":
                    loaded.set()
                else:
                    _note(told["method"], told.get("params", {}), seen, page)

        async def ask(method: str, **params: Any) -> Any:
            number = next(numbers)
            waiting[number] = asyncio.get_running_loop().create_future()
            message = {"id": number, "method": method, "params": params}
            await socket.send_json(message | ({"sessionId": session_id} if session_id else {}))
            told = await asyncio.wait_for(waiting[number], LOADED_S)
            assert "error" not in told, told
            return told["result"]

        listener = asyncio.ensure_future(listen())
        target = await ask("Target.createTarget", url="about:blank")
        attached = await ask("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        session_id = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            await ask(f"{domain}.enable")
        await ask(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=900, deviceScaleFactor=1, mobile=width < 500,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await ask("Emulation.setEmulatedMedia", features=[scheme])
        await ask("Page.navigate", url=page.as_uri())
        await asyncio.wait_for(loaded.wait(), LOADED_S)
        await asyncio.sleep(DRAWN_S)
        for expression in asked:
            told = await ask("Runtime.evaluate", expression=expression, returnByValue=True)
            assert "exceptionDetails" not in told, told
            seen.answers.append(told["result"].get("value"))
        if picture is not None:
            shot = await ask("Page.captureScreenshot", captureBeyondViewport=True)
            picture.write_bytes(base64.b64decode(shot["data"]))
        listener.cancel()
        return seen


async def _address(room: Path) -> str:
    """Of the browser's protocol: it writes port and path there."""
    told = room / "DevToolsActivePort"
    for _ in range(int(STARTED_S / 0.1)):
        if told.exists() and len(lines := told.read_text().splitlines()) == 2:
            return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
        await asyncio.sleep(0.1)
    raise AssertionError("the browser does not start")


def _note(method: str, about: dict[str, Any], seen: Seen, page: Path) -> None:
    if method == "Runtime.exceptionThrown":
        seen.errors.append(str(about["exceptionDetails"]))
    elif method == "Log.entryAdded" and about["entry"]["level"] == "error":
        seen.errors.append(str(about["entry"]))
    elif method == "Runtime.consoleAPICalled" and about["type"] in ("error", "assert"):
        seen.errors.append(str(about["args"]))
    elif method == "Network.requestWillBeSent":
        url = about["request"]["url"]
        if url != page.as_uri() and not url.startswith(("data:", "blob:")):
            seen.requests.append(url)
