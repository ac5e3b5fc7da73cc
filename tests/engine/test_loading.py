from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.engine.support import mixed_requests, tokens
from tests.tiny.llava import save_tiny_checkpoint
from trio.decoder import default_dtype
from trio.engine.engine import Engine
from trio.engine.loading import (
    default_kv_bytes,
    default_limits,
    load,
    load_preprocessor,
    load_processor,
)
from trio.engine.preprocess import Preprocessor
from trio.errors import UserError
from trio.families.llava import LlavaAdapter
from trio.pruning.options import Pruning


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("model"), spread=0.4)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (None, torch.float32),
        ("auto", torch.float32),
        ("bfloat16", torch.bfloat16),
        (torch.float64, torch.float64),
    ],
)
def test_dtype_on_a_cpu(
    checkpoint: Path, dtype: str | torch.dtype | None, expected: torch.dtype
) -> None:
    model, _ = load(str(checkpoint), device="cpu", dtype=dtype)
    assert model.dtype == expected
    assert not model.training


def test_a_cpu_with_matrix_units_keeps_half_precision_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    half = str(save_tiny_checkpoint(tmp_path, dtype=torch.bfloat16))
    for there, expected in ((False, torch.float32), (True, torch.bfloat16)):
        monkeypatch.setattr(default_dtype, "has_matrix_units", lambda _, there=there: there)
        caplog.clear()
        model, _ = load(half, device="cpu")
        assert model.dtype == expected
        said = [record.message for record in caplog.records if "is loaded in" in record.message]
        assert len(said) == there
    assert "is loaded in bfloat16: the checkpoint is bfloat16, and this CPU" in said[0]
    assert load(half, device="cpu", dtype="float32")[0].dtype == torch.float32


def test_workers_prepare_with_the_processor_alone(checkpoint: Path) -> None:
    preparer = Preprocessor(load_processor(str(checkpoint)), LlavaAdapter)
    assert "Pil" in type(preparer._processor.image_processor).__name__
    engine = Engine.from_pretrained(str(checkpoint), device="cpu")
    requests = mixed_requests(4)
    items = [preparer(request) for request in requests]
    for item in items:
        engine.submit(item)
    results = []
    while engine.has_work:
        results += engine.step()
    assert tokens(results) == tokens(engine.generate(requests))


def test_a_process_without_a_model_prepares_what_the_engine_does(
    checkpoint: Path, tmp_path: Path
) -> None:
    system = "please describe"
    engine = Engine.from_pretrained(str(checkpoint), device="cpu", system=system)
    for file in checkpoint.iterdir():
        weights = file.suffix == ".safetensors"
        (tmp_path / file.name).write_bytes(b"never read" if weights else file.read_bytes())
    prepare = load_preprocessor(str(tmp_path), system=system)
    requests = mixed_requests(4)
    processed = [
        replace(request, images=tuple(prepare.process(request.images))) for request in requests
    ]
    assert tokens(engine.generate(processed)) == tokens(engine.generate(requests))
    with pytest.raises(UserError, match="max_pixels cannot be set"):
        load_preprocessor(str(tmp_path), max_pixels=10_000)
    with pytest.raises(UserError, match="there is no model directory"):
        load_preprocessor(str(tmp_path / "nowhere"))


def test_half_precision_serves(checkpoint: Path) -> None:
    engine = Engine.from_pretrained(
        str(checkpoint), device="cpu", dtype="bfloat16", pruning=Pruning(retention=0.5)
    )
    results = list(engine.generate(mixed_requests(6)))
    assert all(result.error is None for result in results)


def message(model: object) -> str:
    with pytest.raises(UserError) as caught:
        Engine.from_pretrained(str(model), device="cpu")
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_directory_below_the_home_of_the_user(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(checkpoint.parent))
    model, _ = load(f"~/{checkpoint.name}", device="cpu")
    assert model.config.model_type == "llava"
    assert load_processor(f"~/{checkpoint.name}").chat_template


def test_wrong_directories_are_named(checkpoint: Path, tmp_path: Path) -> None:
    assert "there is no model directory" in message(tmp_path / "nowhere")
    assert "no config.json" in message(tmp_path)
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    assert "safetensors" in message(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    assert "safetensors" in message(tmp_path)


@pytest.mark.parametrize("config", [{"model_type": "qwen2_vl"}, {"model_type": "unheard-of"}])
def test_other_architectures_are_refused_before_their_weights_are_read(
    checkpoint: Path, tmp_path: Path, config: dict[str, str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"never read")
    assert config["model_type"] in message(tmp_path)


def test_code_of_a_repository_is_never_run(checkpoint: Path, tmp_path: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["model_type"] = "homemade"
    config["auto_map"] = {"AutoConfig": "homemade.Config"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "homemade.py").write_text("raise SystemExit('the code was run')")
    (tmp_path / "model.safetensors").write_bytes(b"never read")
    assert "custom code" in message(tmp_path)


@pytest.mark.parametrize("dtype", ["bf16", "", torch.int8])
def test_a_wrong_dtype_is_told_the_right_ones(checkpoint: Path, dtype: str | torch.dtype) -> None:
    with pytest.raises(UserError) as caught:
        load(str(checkpoint), device="cpu", dtype=dtype)
    assert str(caught.value) == (
        f"dtype {dtype!r} is none of auto, float32, bfloat16, float16, float64"
    )


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("gpu", "'gpu' is no device; give cpu, cuda or cuda:0"),
        ("meta", "device meta has no weights"),
        ("xpu:7", "no device xpu:7 here"),
    ],
)
def test_a_wrong_device_is_the_users_mistake(checkpoint: Path, device: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        load(str(checkpoint), device=device)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="only without a CUDA device")
def test_a_device_that_is_not_there_is_refused(checkpoint: Path) -> None:
    with pytest.raises(UserError, match="no CUDA device"):
        load(str(checkpoint), device="cuda")


@pytest.mark.parametrize(
    ("free_gb", "share", "expected"),
    [(15.5, 1.0, 16384), (1.6, 1.0, 2048), (0.1, 1.0, 1024), (15.5, 0.1, 2048)],
)
def test_a_small_gpu_reads_fewer_tokens_at_once_and_says_so(
    free_gb: float,
    share: float,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Of 16 GB; LLaVA-1.5-7B's prefill takes 3.2 GB for 16,384 tokens."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free_gb * 1e9), 16 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    decoder: Any = SimpleNamespace(
        device=torch.device("cuda"), dtype=torch.float16, hidden_size=4096, intermediate_size=11008
    )
    tokens, _ = default_limits(decoder, share)
    assert tokens == expected
    assert (f"batch_tokens is {tokens}, not 16384" in caplog.text) == (tokens < 16384)
    if tokens > 1024:
        most = min(free_gb, 16 * share) * 0.9e9
        assert most / 2 <= default_kv_bytes(decoder, tokens, share) < most
