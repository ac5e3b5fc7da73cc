"""An adapter as a user of the package may write one."""

from __future__ import annotations

from trio.families.llava import LlavaAdapter


class Theirs(LlavaAdapter):
    """LLaVA whose kept tokens keep their positions."""

    default_position_ids = "keep"
