"""Who finds an adapter for a model: built in, registered, or brought by an installed package."""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlavaConfig

import trio
from tests.tiny.llava import tiny_llava
from trio.decoder.decoder import Decoder
from trio.errors import UserError
from trio.families import registry
from trio.families.llava import LlavaAdapter

PLUGIN = """
from trio.families.llava import LlavaAdapter
class Adapter(LlavaAdapter):
    default_position_ids = "keep"
"""


class Renumbering(LlavaAdapter):
    default_position_ids = "keep"


def test_every_built_in_adapter_is_there() -> None:
    for kind in registry.supported():
        config: Any = LlavaConfig()
        config.model_type = kind
        assert issubclass(registry.adapter_class(config), trio.Adapter)


def test_a_registered_adapter_is_used_and_may_replace_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})
    model = tiny_llava(layers=2)
    assert type(registry.adapt(model)) is LlavaAdapter
    trio.register("llava", Renumbering)
    assert type(registry.adapt(model)) is Renumbering
    trio.register("my_llava", Renumbering)
    model.config.model_type = "my_llava"
    assert type(registry.adapt(model)) is Renumbering
    assert "my_llava" in registry.supported()


class Elsewhere(LlavaAdapter):
    """Its head is not where others have it."""

    def _decoder(self) -> Decoder:
        return Decoder(self.model.model.language_model, self.model.out)


def test_an_adapter_says_where_decoder_and_head_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})
    model = tiny_llava(layers=2)
    model.out = model.lm_head
    del model.lm_head
    with pytest.raises(UserError, match=r"is not supported: it has no .* lm_head"):
        registry.adapt(model)
    trio.register("llava", Elsewhere)
    assert registry.adapt(model).decoder.lm_head is model.out


@pytest.mark.parametrize("adapter", [object, "LlavaAdapter", None])
def test_only_adapters_can_be_registered(adapter: object) -> None:
    with pytest.raises(UserError, match="is not complete"):
        trio.register("my_vl", trio.Adapter)  # type: ignore[type-abstract]
    with pytest.raises(UserError, match=r"'my_vl', .* no subclass of trio\.Adapter"):
        trio.register("my_vl", adapter)  # type: ignore[arg-type]


def test_an_unsupported_type_is_told_what_is_supported() -> None:
    config: Any = LlavaConfig()
    config.model_type = "sight"
    with pytest.raises(UserError, match=r"type 'sight' .*llava, llava_next, .*Adding a family"):
        registry.adapter_class(config)


def test_installed_packages_bring_families(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "their_vl.py").write_text(PLUGIN)
    (tmp_path / "their_broken_vl.py").write_text("class Adapter(")
    info = tmp_path / "their_vl-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-vl\nVersion: 1.0\n")
    lines = [
        "their_vl = their_vl:Adapter",
        "gone = no_such_module:Adapter",
        "odd = their_vl:PLUGIN",
        "function = json:dumps",
        "broken = their_broken_vl:Adapter",
        "half = trio.families.adapter:Adapter",
        "llava = their_vl:Adapter",
    ]
    (info / "entry_points.txt").write_text("\n".join(["[trio_vlm.adapters]", *lines]))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_entries", functools.cache(registry._entries.__wrapped__))
    assert {"their_vl", "llava"} <= {*registry.supported()}
    for kind, positions in (("their_vl", "keep"), ("llava", "renumber")):
        found = registry.adapter_class(SimpleNamespace(model_type=kind))
        assert found.default_position_ids == positions
    for kind, message in {
        "gone": "no_such_module:Adapter, cannot be loaded: ModuleNotFoundError: No module",
        "odd": "their_vl:PLUGIN, cannot be loaded",
        "function": "^the adapter for 'function', json:dumps, is no subclass of trio.Adapter$",
        "broken": "their_broken_vl:Adapter, cannot be loaded: SyntaxError",
        "half": "is not complete: it lacks _features, check_inputs",
    }.items():
        with pytest.raises(UserError, match=message):
            registry.adapter_class(SimpleNamespace(model_type=kind))
