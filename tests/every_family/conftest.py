"""The families that a test here runs through."""

from __future__ import annotations

from typing import Any

import pytest

from tests.every_family.family import ARCHITECTURES, FAMILIES, Family

# Elsewhere LLaVA runs through the decoders.
SLOW = ("llava-mistral", "llava-qwen2", "llava_next-mistral")
ANY = [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in FAMILIES]


@pytest.fixture(scope="module", params=ANY)
def any_family(request: Any) -> Family:
    return FAMILIES[request.param]()


@pytest.fixture(scope="module", params=ARCHITECTURES)
def family(request: Any) -> Family:
    """One of each adapter."""
    return FAMILIES[request.param]()
