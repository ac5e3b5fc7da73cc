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
from trio.engine.engine import Engine
from trio.engine.loading import load, load_processor
from trio.errors import UserError

FAMILIES: dict[str, Callable[[Path], Path]] = {
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
    return {name: save(tmp_path_factory.mktemp(name)) for name, save in FAMILIES.items()}


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


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


NF4 = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_use_double_quant": True,
}
QUANTISED: list[tuple[dict[str, Any], str]] = [
    (NF4, "bitsandbytes, 4 bit"),
    ({"load_in_8bit": True, "llm_int8_threshold": 6.0}, "bitsandbytes, 8 bit"),
    ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}, "awq, 4 bit"),
    ({"quant_method": "gptq", "bits": 8, "group_size": 128, "desc_act": False}, "gptq, 8 bit"),
    ({"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}, "fp8"),
    ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "compressed-tensors"),
    ({"group_size": 64, "bits": 4}, "unnamed method, 4 bit"),
]


@pytest.mark.parametrize(("settings", "method"), QUANTISED, ids=[name for _, name in QUANTISED])
def test_quantised_checkpoints_are_refused_before_their_weights_are_read(
    llava: Path, settings: dict[str, Any], method: str
) -> None:
    (llava / "model.safetensors").write_bytes(b"never read")
    edit(llava / "config.json", lambda config: config.update(quantization_config=settings))
    text = message(llava)
    assert f"is quantised ({method})" in text and "--dtype" in text


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_a_quantised_part_is_enough(llava: Path, part: str) -> None:
    edit(llava / "config.json", lambda config: config[part].update(quantization_config=NF4))
    assert "is quantised (bitsandbytes, 4 bit)" in message(llava)


def test_the_older_config_of_a_quantised_qwen(copy: Callable[[str], Path]) -> None:
    """Its decoder's settings stand beside the tower's, and with them those of the weights."""
    directory = copy("qwen2_5_vl")
    awq = {"quant_method": "awq", "bits": 4, "modules_to_not_convert": ["visual"]}
    edit(directory / "config.json", lambda config: config.update(quantization_config=awq))
    assert "is quantised (awq, 4 bit)" in message(directory)


def test_nothing_is_quantised_where_the_config_says_null(llava: Path) -> None:
    edit(llava / "config.json", lambda config: config.update(quantization_config=None))
    assert load(str(llava), device="cpu")[0].dtype == torch.float32


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4567\n"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda data: data[:-1000], "incomplete metadata"),
        (lambda data: data[:100], "invalid header"),
        (lambda data: b"", "header too small"),
        (lambda data: b"\x00\xff garbage" * 99, "header too large"),
        (lambda data: POINTER, "run git lfs pull"),
    ],
    ids=["cut", "cut-in-its-header", "empty", "garbage", "git-lfs-pointer"],
)
def test_damaged_weights_are_named(llava: Path, spoil: Callable[[bytes], bytes], said: str) -> None:
    file = llava / "model.safetensors"
    file.write_bytes(spoil(file.read_bytes()))
    text = message(llava)
    assert str(file) in text and said in text


def shards(directory: Path) -> list[Path]:
    """The same checkpoint in many files."""
    model, _ = load(str(directory), device="cpu")
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, max_shard_size="40KB")
    files = sorted(directory.glob("model-*.safetensors"))
    assert len(files) > 2
    return files


def test_a_damaged_or_missing_shard_is_named(llava: Path) -> None:
    before = load(str(llava), device="cpu")[0].state_dict()
    second = shards(llava)[1]
    after = load(str(llava), device="cpu")[0].state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    whole = second.read_bytes()
    second.write_bytes(whole[:-8])
    assert str(second) in message(llava)
    second.unlink()
    assert str(second) in message(llava)


def test_a_damaged_index_is_named(llava: Path) -> None:
    shards(llava)
    index = llava / "model.safetensors.index.json"
    index.write_text(index.read_text()[:200])
    assert f"{index}: cannot be read as JSON" in message(llava)
    index.write_text("{}")
    assert "weight_map" in message(llava)
    index.unlink()
    assert "no file named model.safetensors" in message(llava)


PROJECTIONS = "language_model.model.layers.0.self_attn."


def test_missing_tensors_are_an_error_and_named(llava: Path) -> None:
    names = [f"{PROJECTIONS}{kind}_proj.weight" for kind in "qkvo"]
    edit_weights(llava, lambda tensors: tensors.pop(names[1]))
    text = message(llava)
    assert "layers.0.self_attn.k_proj.weight" in text and "more" not in text
    edit_weights(llava, lambda tensors: [tensors.pop(names[i]) for i in (0, 2, 3)])
    text = message(llava)
    assert "layers.0.self_attn.o_proj.weight" in text and "and 1 more" in text


def test_tensors_of_another_shape_are_named_with_both(llava: Path) -> None:
    name = f"{PROJECTIONS}k_proj.weight"
    edit_weights(llava, lambda tensors: tensors.update({name: tensors[name][:3].contiguous()}))
    assert "layers.0.self_attn.k_proj.weight is [3, 32], not [16, 32]" in message(llava)


def test_a_config_of_another_size_does_not_fit_the_weights(llava: Path) -> None:
    edit(llava / "config.json", lambda config: config["text_config"].update(intermediate_size=128))
    text = message(llava)
    assert "other shapes than config.json says" in text and "more" in text


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


@pytest.mark.parametrize("surplus", ["extra.weight", "logit_scale", "ROTARY"])
def test_leftovers_of_older_versions_are_no_error(llava: Path, surplus: str) -> None:
    name = surplus.replace("ROTARY", "language_model.model.layers.0.self_attn.rotary_emb.inv_freq")
    edit_weights(llava, lambda tensors: tensors.update({name: torch.ones(2)}))
    load(str(llava), device="cpu")


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

    def scale(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if name.endswith("q_proj.weight"))
        tensors[f"{name}_scale_inv"] = torch.ones(1)

    edit_weights(llava, scale)
    assert "q_proj.weight_scale_inv" in message(llava)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("hidden_size", "32"), ("num_attention_heads", 3), ("rope_parameters", {"rope_type": "foo"})],
)
def test_settings_that_no_model_has_are_named(llava: Path, setting: str, value: object) -> None:
    edit(llava / "config.json", lambda config: config["text_config"].update({setting: value}))
    assert "config.json" in message(llava)


@pytest.mark.parametrize("content", ["", '{"a": ', "[]", "3", "\x00\x01"])
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "processor_config.json",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ],
)
def test_files_that_are_no_json_are_named(llava: Path, name: str, content: str) -> None:
    (llava / name).write_text(content)
    assert f"{llava / name}: cannot be read as JSON" in message(llava)


def test_a_tokenizer_that_is_json_and_no_tokenizer(llava: Path) -> None:
    (llava / "tokenizer.json").write_text("{}")
    assert "the processor of" in message(llava)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tokenizer.json", "it has no tokenizer.json"),
        ("processor_config.json", "it has neither processor_config.json"),
    ],
)
def test_missing_files_are_named_before_the_weights_are_read(
    llava: Path, name: str, said: str
) -> None:
    (llava / "model.safetensors").write_bytes(b"never read")
    (llava / name).unlink()
    assert f"is incomplete: {said}" in message(llava)
    with pytest.raises(UserError, match="incomplete"):
        load_processor(str(llava))


def in_the_hubs_cache(root: Path, directory: Path) -> None:
    repo = root / "models--org--name"
    shutil.copytree(directory, repo / "snapshots" / ("a" * 40))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)


def test_damaged_files_in_the_cache_of_the_hub_are_named(
    llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    file = llava / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    in_the_hubs_cache(tmp_path / "cache", llava)
    with pytest.raises(
        UserError, match=r"snapshots/a+/model\.safetensors: no readable safetensors"
    ):
        load("org/name", device="cpu")


def older(directory: Path, kind: str, *, oldest: bool = False) -> None:
    """The files as older versions of transformers wrote them.

    oldest: from before a processor had a file of its own beside its image processor's.
    """
    old, new = directory / "preprocessor_config.json", directory / "processor_config.json"
    if new.is_file():
        values = json.loads(new.read_text())
        old.write_text(json.dumps(values.pop("image_processor")))
        new.write_text(json.dumps(values))
        if oldest:
            new.unlink()
    edit(old, lambda images: images.update(image_processor_type=kind))
    template = directory / "chat_template.jinja"
    (directory / "chat_template.json").write_text(
        json.dumps({"chat_template": template.read_text()})
    )
    template.unlink()


@pytest.mark.parametrize("backend", ["", "Fast", "Pil"])
def test_older_layouts_and_other_backends_load_on_pil(
    copy: Callable[[str], Path], saved: dict[str, Path], family: str, backend: str
) -> None:
    directory = copy(family)
    older(directory, IMAGES[family] + backend)
    loaded, expected = load_processor(str(directory)), load_processor(str(saved[family]))
    assert type(loaded.image_processor).__name__ == IMAGES[family] + "Pil"
    assert loaded.image_processor.to_dict() == expected.image_processor.to_dict()
    assert loaded.chat_template == expected.chat_template


@pytest.mark.parametrize("backend", ["", "Fast", "Pil"])
def test_newer_layouts_of_other_backends_load_on_pil(
    copy: Callable[[str], Path], saved: dict[str, Path], family: str, backend: str
) -> None:
    directory = copy(family)
    new, old = directory / "processor_config.json", directory / "preprocessor_config.json"
    if new.is_file():
        values = json.loads(new.read_text())
    else:
        values = {"image_processor": json.loads(old.read_text())}
        old.unlink()
    values["image_processor"]["image_processor_type"] = IMAGES[family] + backend
    new.write_text(json.dumps(values))
    loaded, expected = load_processor(str(directory)), load_processor(str(saved[family]))
    assert type(loaded.image_processor).__name__ == IMAGES[family] + "Pil"
    assert loaded.image_processor.size == expected.image_processor.size


@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_what_the_first_processors_left_out_is_in_the_config(
    copy: Callable[[str], Path], saved: dict[str, Path], name: str
) -> None:
    directory = copy(name)
    older(directory, IMAGES[name], oldest=True)
    loaded, expected = load_processor(str(directory)), load_processor(str(saved[name]))
    for attribute in (
        "patch_size",
        "vision_feature_select_strategy",
        "num_additional_image_tokens",
    ):
        assert getattr(loaded, attribute) == getattr(expected, attribute)
    Engine.from_pretrained(str(directory), device="cpu", kv_bytes=1 << 26)


def test_a_model_saved_in_half_precision_keeps_it_with_auto(tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path)
    tiny_llava(dtype=torch.bfloat16).save_pretrained(tmp_path)
    for asked, expected in (("auto", torch.bfloat16), (None, torch.float32)):
        assert load(str(tmp_path), device="cpu", dtype=asked)[0].dtype == expected
