"""A page as a browser's parser sees it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

REFERENCES = ("src", "href", "srcset", "action", "poster", "data", "background", "formaction")
VOID = {"meta", "link", "input", "br", "img", "hr"}


class Page(HTMLParser):
    """Its elements, texts, scripts and data."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.styles: list[str] = []
        self.words: list[str] = []
        self._open: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()
        self.unclosed = [tag for tag, _ in self._open]

    @classmethod
    def of(cls, path: Path) -> Page:
        return cls(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open[-1][0] == tag, f"</{tag}> closes {self._open[-1:]}"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        tag, about = self._open[-1] if self._open else ("", {})
        if tag == "script":
            self.scripts.append((about, data))
        elif tag == "style":
            self.styles.append(data)
        elif data.strip():
            self.words.append(" ".join(data.split()))

    @property
    def text(self) -> str:
        return "\n".join(self.words)

    @property
    def data(self) -> dict[str, Any]:
        (found,) = [text for about, text in self.scripts if about.get("id") == "data"]
        loaded: dict[str, Any] = json.loads(found)
        return loaded

    @property
    def sections(self) -> set[str]:
        return {
            about["id"] or "" for tag, about in self.elements if tag == "section" and "id" in about
        }

    @property
    def own_script(self) -> str:
        return self.scripts[-1][1]


def tiles_of(text: str) -> dict[str, tuple[str, str]]:
    """Headline figures by label: the value and what stands below."""
    found = re.findall(
        r'<p class="label">(.*?)</p>\s*<p class="value">(.*?)</p>\s*(?:<p class="note">(.*?)</p>)?',
        text,
        re.DOTALL,
    )
    return {label: (value, note) for label, value, note in found}


def outside(page: Page) -> list[str]:
    """Whatever in it leads elsewhere, or would be fetched."""
    found = []
    for tag, about in page.elements:
        for name, value in about.items():
            if name in REFERENCES and value and not value.startswith(("#", "data:")):
                found.append(f"{tag} {name}={value}")
            if name.startswith("on"):
                found.append(f"{tag} {name}")
            if name == "style" and value and "url(" in value:
                found.append(f"{tag} style")
    found += [style for style in page.styles if "@import" in style or "url(" in style]
    calls = (
        r"\b(fetch|XMLHttpRequest|WebSocket|EventSource|sendBeacon|import)\b|innerHTML|https?://"
    )
    found += re.findall(calls, page.own_script)
    return found
