"""Checkpoints that are quantised, damaged, incomplete or of an older make."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny.llava import LLAVA_NEXT, save_tiny_checkpoint, tiny_llava
from tests.tiny.qwen2_5_vl import save_tiny_qwen
from trio.decoder import default_dtype
from trio.engine.engine import Engine
from trio.engine.loading import load, load_processor
from trio.errors import UserError

SAVE: dict[str, Callable[[Path], Path]] = {
    "llava": save_tiny_checkpoint,
    "llava_next": lambda path: save_tiny_checkpoint(path, **LLAVA_NEXT),
    "qwen2_5_vl": save_tiny_qwen,
}
IMAGES = {
    "llava": "CLIPImageProcessor",
    "llava_next": "LlavaNextImageProcessor",
    "qwen2_5_vl": "Qwen2VLImageProcessor",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save(tmp_path_factory.mktemp(name)) for name, save in SAVE.items()}


@pytest.fixture
def copy(saved: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A checkpoint of a family to be spoilt."""
    return lambda name: shutil.copytree(saved[name], tmp_path / name)


@pytest.fixture
def llava(copy: Callable[[str], Path]) -> Path:
    return copy("llava")


def message(directory: Path) -> str:
    with pytest.raises(UserError) as caught:
        load(str(directory), device="cpu")
    text = str(caught.value)
    assert "\n" not in text and str(directory) in text
    return text


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def edit_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("part", "settings", "method"),
    [
        (None, {"quant_method": "awq", "bits": 4}, "awq, 4 bit"),
        ("text_config", {"load_in_8bit": True}, "bitsandbytes, 8 bit"),
        ("vision_config", {"group_size": 64}, "unnamed method"),
    ],
)
def test_quantised_checkpoints_are_refused_before_their_weights_are_read(
    llava: Path, part: str | None, settings: dict[str, Any], method: str
) -> None:
    (llava / "model.safetensors").write_bytes(b"never read")

    def quantise(config: dict[str, Any]) -> None:
        (config[part] if part else config)["quantization_config"] = settings

    edit(llava / "config.json", quantise)
    text = message(llava)
    assert f"is quantised ({method})" in text and "--dtype" in text


def test_nothing_is_quantised_where_the_config_says_null(llava: Path) -> None:
    edit(llava / "config.json", lambda config: config.update(quantization_config=None))
    assert load(str(llava), device="cpu")[0].dtype == torch.float32


def shards(directory: Path) -> list[Path]:
    """The same checkpoint in many files."""
    model, _ = load(str(directory), device="cpu")
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, max_shard_size="40KB")
    return sorted(directory.glob("model-*.safetensors"))


@pytest.mark.parametrize(
    ("name", "spoil", "said"),
    [
        ("model.safetensors", lambda data: data[:-1000], "incomplete metadata"),
        ("model.safetensors", lambda data: b"", "header too small"),
        (
            "model.safetensors",
            lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\n",
            "run git lfs pull",
        ),
        ("config.json", lambda data: data[:-5], "cannot be read as JSON"),
        ("generation_config.json", lambda data: b"[]", "cannot be read as JSON"),
        ("processor_config.json", lambda data: b"", "cannot be read as JSON"),
        ("tokenizer.json", lambda data: b"\x00\x01", "cannot be read as JSON"),
        ("tokenizer_config.json", lambda data: b"3", "cannot be read as JSON"),
    ],
)
def test_a_damaged_file_is_named(
    llava: Path, name: str, spoil: Callable[[bytes], bytes], said: str
) -> None:
    file = llava / name
    file.write_bytes(spoil(file.read_bytes()))
    text = message(llava)
    assert str(file) in text and said in text


def test_a_tokenizer_that_is_json_and_no_tokenizer(llava: Path) -> None:
    (llava / "tokenizer.json").write_text("{}")
    assert "the processor of" in message(llava)


def test_shards_and_their_index(llava: Path) -> None:
    before = load(str(llava), device="cpu")[0].state_dict()
    second = shards(llava)[1]
    after = load(str(llava), device="cpu")[0].state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    second.write_bytes(second.read_bytes()[:-8])
    assert str(second) in message(llava)
    second.unlink()
    assert str(second) in message(llava)
    index = llava / "model.safetensors.index.json"
    index.write_text(index.read_text()[:200])
    assert f"{index}: cannot be read as JSON" in message(llava)
    index.write_text("{}")
    assert "weight_map" in message(llava)
    index.unlink()
    assert "no file named model.safetensors" in message(llava)


def test_missing_tensors_and_those_of_another_shape_are_named(llava: Path) -> None:
    names = [f"language_model.model.layers.0.self_attn.{kind}_proj.weight" for kind in "qkvo"]
    edit_weights(llava, lambda tensors: tensors.update({names[1]: tensors[names[1]][:3].clone()}))
    assert "layers.0.self_attn.k_proj.weight is [3, 32], not [16, 32]" in message(llava)
    edit_weights(llava, lambda tensors: tensors.pop(names[1]))
    text = message(llava)
    assert "its weights lack" in text and "layers.0.self_attn.k_proj.weight" in text
    assert "more" not in text
    edit_weights(llava, lambda tensors: [tensors.pop(names[i]) for i in (0, 2, 3)])
    assert "and 1 more" in message(llava)


@pytest.mark.parametrize("family", SAVE)
def test_a_tied_head_is_not_missing(copy: Callable[[str], Path], family: str) -> None:
    directory = copy(family)
    edit_weights(
        directory,
        lambda tensors: [tensors.pop(name) for name in list(tensors) if "lm_head" in name],
    )
    assert "its weights lack lm_head.weight" in message(directory)
    edit(directory / "config.json", lambda config: config.update(tie_word_embeddings=True))
    model, _ = load(str(directory), device="cpu")
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_leftovers_of_older_versions_are_no_error(llava: Path) -> None:
    layer = "language_model.model.layers.0.self_attn"
    left = [f"{layer}.rotary_emb.inv_freq", "extra.weight", "logit_scale"]
    edit_weights(llava, lambda tensors: tensors.update({name: torch.ones(2) for name in left}))
    load(str(llava), device="cpu")


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_layers_that_the_config_leaves_out_are_an_error(
    copy: Callable[[str], Path], family: str
) -> None:
    """The model would answer, and otherwise."""
    directory = copy(family)

    def shorten(config: dict[str, Any]) -> None:
        text = config.get("text_config", config)
        text["num_hidden_layers"] -= 2
        text.pop("layer_types", None)

    edit(directory / "config.json", shorten)
    text = message(directory)
    assert "config.json describes a model without " in text and ".layers.4." in text


def test_scales_of_quantised_weights_are_an_error(llava: Path) -> None:
    """Also where the config does not speak of them."""
    scale = "language_model.lm_head.weight_scale_inv"
    edit_weights(llava, lambda tensors: tensors.update({scale: torch.ones(1)}))
    assert "weight_scale_inv" in message(llava)


@pytest.mark.parametrize(
    ("setting", "value"), [("hidden_size", "32"), ("rope_parameters", {"rope_type": "foo"})]
)
def test_settings_that_no_model_has_are_named(llava: Path, setting: str, value: object) -> None:
    edit(llava / "config.json", lambda config: config["text_config"].update({setting: value}))
    assert "config.json" in message(llava)


@pytest.mark.parametrize(
    ("name", "said"),
    [("tokenizer.json", "it has no tokenizer.json"), ("processor_config.json", "the processor")],
)
def test_missing_files_are_told(llava: Path, name: str, said: str) -> None:
    (llava / name).unlink()
    assert said in message(llava)


def test_damaged_files_in_the_cache_of_the_hub_are_named(
    llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repo = tmp_path / "cache" / "models--org--name"
    snapshot = shutil.copytree(llava, repo / "snapshots" / ("a" * 40))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    for name, said in (
        ("model.safetensors", "no readable safetensors file"),
        ("processor_config.json", "cannot be read as JSON"),
    ):
        (snapshot / name).write_bytes(b"")
        with pytest.raises(UserError, match=f"snapshots/a+/{name}: {said}"):
            load("org/name", device="cpu")


def in_two_files(directory: Path) -> Path:
    """The image processor's settings in a file of their own; that file."""
    old, new = directory / "preprocessor_config.json", directory / "processor_config.json"
    if new.is_file():
        values = json.loads(new.read_text())
        old.write_text(json.dumps(values.pop("image_processor")))
        new.write_text(json.dumps(values))
    return old


@pytest.mark.parametrize(("family", "backend"), [*zip(SAVE, ["", "Fast", "Pil"], strict=True)])
def test_older_layouts_and_other_backends_load_on_pil(
    copy: Callable[[str], Path], saved: dict[str, Path], family: str, backend: str
) -> None:
    directory = copy(family)
    expected = load_processor(str(saved[family]))
    kind = IMAGES[family] + backend
    edit(in_two_files(directory), lambda images: images.update(image_processor_type=kind))
    template = directory / "chat_template.jinja"
    (directory / "chat_template.json").write_text(
        json.dumps({"chat_template": template.read_text()})
    )
    template.unlink()
    loaded = load_processor(str(directory))
    assert type(loaded.image_processor).__name__ == IMAGES[family] + "Pil"
    assert loaded.image_processor.to_dict() == expected.image_processor.to_dict()
    assert loaded.chat_template == expected.chat_template


@pytest.mark.parametrize(("family", "backend"), [*zip(SAVE, ["Pil", "", "Fast"], strict=True)])
def test_newer_layouts_of_other_backends_load_on_pil(
    copy: Callable[[str], Path], saved: dict[str, Path], family: str, backend: str
) -> None:
    directory = copy(family)
    old, new = in_two_files(directory), directory / "processor_config.json"
    images = json.loads(old.read_text()) | {"image_processor_type": IMAGES[family] + backend}
    values = json.loads(new.read_text()) if new.is_file() else {}
    new.write_text(json.dumps(values | {"image_processor": images}))
    old.unlink()
    loaded, expected = load_processor(str(directory)), load_processor(str(saved[family]))
    assert type(loaded.image_processor).__name__ == IMAGES[family] + "Pil"
    assert loaded.image_processor.size == expected.image_processor.size


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_what_the_first_processors_left_out_is_in_the_config(
    copy: Callable[[str], Path], saved: dict[str, Path], family: str
) -> None:
    directory = copy(family)
    in_two_files(directory)
    (directory / "processor_config.json").unlink()
    loaded, expected = load_processor(str(directory)), load_processor(str(saved[family]))
    for name in ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens"):
        assert getattr(loaded, name) == getattr(expected, name)
    Engine.from_pretrained(str(directory), device="cpu", kv_bytes=1 << 26)


@pytest.mark.parametrize("units", [False, True])
def test_a_model_saved_in_half_precision_keeps_it_with_auto(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, units: bool
) -> None:
    """Without a word it does where the CPU has matrix units for it."""
    monkeypatch.setattr(default_dtype, "has_matrix_units", lambda cpuinfo: units)
    save_tiny_checkpoint(tmp_path)
    tiny_llava(dtype=torch.bfloat16).save_pretrained(tmp_path)
    plain = torch.bfloat16 if units else torch.float32
    for asked, expected in (("auto", torch.bfloat16), (None, plain)):
        assert load(str(tmp_path), device="cpu", dtype=asked)[0].dtype == expected
