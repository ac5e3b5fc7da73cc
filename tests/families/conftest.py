"""The families that a test here runs through."""

from __future__ import annotations

from typing import Any

import pytest

from tests.families.family import ARCHITECTURES, FAMILIES, Family


@pytest.fixture(scope="module", params=FAMILIES)
def any_family(request: Any) -> Family:
    return FAMILIES[request.param]()


@pytest.fixture(scope="module", params=ARCHITECTURES)
def family(request: Any) -> Family:
    """One of each adapter."""
    return FAMILIES[request.param]()
