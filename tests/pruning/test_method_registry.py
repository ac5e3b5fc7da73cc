"""Methods by name: built in, registered, named by their module, brought by an installed package."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import trio
from tests.pruning.longest import Longest
from tests.pruning.stages import chosen
from trio.errors import UserError
from trio.pruning import method_registry
from trio.pruning.batch import Ragged
from trio.pruning.method_registry import create, method_class
from trio.pruning.methods.trio import Trio
from trio.pruning.options import Pruning

NAMED = "tests.pruning.longest:Longest"


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(method_registry, "_registered", {})
    method_registry._entries.cache_clear()
    yield
    method_registry._entries.cache_clear()


def test_every_built_in_method_is_complete() -> None:
    names = trio.method_names()
    assert names[:2] == ("trio", "none") and "eadp_llm" in names
    for name in {*names} - {"none"}:
        method = create(Pruning(method=name))
        assert method.name == name and method.summary
        needs = {"gradient", "attention", "coordinates", "text_tower", "instruction"}
        assert method.needs <= needs


def test_a_method_comes_by_registration_by_its_module_or_with_a_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="must be one of trio, none, "):
        Pruning(method="longest")
    assert method_class(NAMED) is Longest
    assert trio.register_method(Longest) is trio.register_method(Longest) is Longest
    assert "longest" in trio.method_names() and isinstance(
        create(Pruning(method="longest")), Longest
    )
    monkeypatch.setattr(method_registry, "_registered", {})
    info = tmp_path / "their_method-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-method\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[trio_vlm.methods]\nlongest = {NAMED}\n")
    monkeypatch.syspath_prepend(tmp_path)
    method_registry._entries.cache_clear()
    assert isinstance(create(Pruning(method="longest")), Longest)


def test_a_method_gets_its_own_settings_and_the_common_ones() -> None:
    batch, hidden = Ragged.of_spans((9,), [[(1, 8)]]), torch.zeros(9, 4)
    hidden[1:8, 0] = torch.tensor([5.0, 1.0, 7.0, 2.0, 6.0, 3.0, 4.0])

    def kept(**options: Any) -> Any:
        choice = chosen(Pruning(schedule="1:2", method=NAMED, **options), hidden, batch, [[2]])
        assert choice is not None and choice.finite_B is not None
        return choice.kept[0, 0]

    assert kept() == [2, 4]
    assert kept(method_options={"end": "short", "power": 1}) == [1, 3]
    assert kept(method_options="end=short,power=1") == [1, 3]
    assert kept(method_options={"flipped": True}) == [1, 3]
    assert kept(method_options={"flipped": False}) == kept(method_options="flipped=false") == [2, 4]
    own = create(Pruning(similarity_threshold=0.7, fill_up="reference"))
    assert isinstance(own, Trio) and (own.similarity_threshold, own.fill_up) == (0.7, "reference")
    assert own.needs == {"gradient"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"method": NAMED, "method_options": {"pwer": 1}},
            "no option 'pwer': it has end, ",
        ),
        ({"method": NAMED, "method_options": "power=x"}, "power must be a float, got 'x'"),
        ({"method": NAMED, "method_options": "end=both"}, "one of long, short, got 'both'"),
        ({"method": "random", "method_options": "seed=3"}, "no option 'seed': it has none"),
        ({"method": NAMED, "method_options": "flipped=maybe"}, "must be true or false"),
        ({"method": f"{__name__}:Needy"}, "needs atention, which nobody has"),
        ({"method": "nowhere:Longest"}, "nowhere:Longest cannot be loaded: ModuleNotFound"),
        ({"method": "tests.pruning.longest:torch"}, "is no subclass of trio.Method"),
        ({"method": f"{__name__}:Unnamed"}, "is not complete: it lacks __call__, flops, name"),
        ({"method": f"{__name__}:Plain"}, "is no dataclass"),
    ],
)
def test_mistakes_say_what_is_wrong(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        create(Pruning(**options))


def test_a_name_is_given_once() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Mine(Longest):
        name = "trio"

    with pytest.raises(UserError, match="'trio' is there already"):
        trio.register_method(Mine)
    with pytest.raises(UserError, match=r"like beta=2\.0"):
        Pruning(method_options="beta")


@dataclass(frozen=True, kw_only=True)
class Unnamed(trio.Method):
    pass


@dataclass(frozen=True, kw_only=True)
class Needy(Longest):
    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"atention"})


class Plain(Longest):
    power: float = 3.0
