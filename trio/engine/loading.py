"""From a model's name to a model on its device."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from trio.errors import UserError, first_line
from trio.models.registry import adapter_class


def load(
    model: str,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
) -> tuple[Any, Any]:
    """Model and processor, see `Engine.from_pretrained`."""
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if where.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {where} was asked for, but torch sees no CUDA device")
    if dtype is None:
        dtype = "auto" if where.type == "cuda" else torch.float32
    model = _expanded(model)
    _check_directory(model)
    which = _which(revision)
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False, **which)
    except (OSError, ValueError) as error:
        raise UserError(f"no model at {model!r}: {first_line(error, None)}") from error
    adapter_class(config)  # refuses what is not supported before weights are fetched
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            model,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            **which,
        )
        processor = _processor(model, config, which)
    except OSError as error:
        raise UserError(f"{model!r} is incomplete: {first_line(error, None)}") from error
    return loaded.to(where).eval(), processor


def load_processor(model: str, *, revision: str | None = None) -> Any:
    """The processor alone, for workers that only prepare requests.

    Images go through PIL wherever it runs: torchvision resizes differently, and a result must not
    depend on whether it happens to be installed.
    """
    model, which = _expanded(model), _which(revision)
    config = AutoConfig.from_pretrained(model, trust_remote_code=False, **which)
    return _processor(model, config, which)


def _processor(model: str, config: Any, which: dict[str, str]) -> Any:
    kind = adapter_class(config).processor_class
    return kind.from_pretrained(model, backend="pil", trust_remote_code=False, **which)


def _which(revision: str | None) -> dict[str, str]:
    return {} if revision is None else {"revision": revision}


def default_kv_bytes(device: torch.device, share: float = 1.0) -> int:
    """Memory for keys and values: what activations can spare of the memory that is free now.

    Args:
        device: with the model on it.
        share: of a GPU's memory, for all that this process has on it.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        left = share * total - torch.cuda.memory_reserved(device)
        return max(0, int(min(free, left) * 0.7))
    return min(_free_memory() // 4, 8 << 30)


def _free_memory() -> int:
    """Bytes of main memory still to be had; all of it where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    (available,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return int(available) * 1024


def _expanded(model: str) -> str:
    """With `~` written out, which transformers would take for the name of a model."""
    return os.path.expanduser(model)


def _check_directory(model: str) -> None:
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{model!r} is no model directory: it has no config.json")
        if not any(path.glob("*.safetensors")):
            raise UserError(f"{model!r} has no *.safetensors; other weight files are not loaded")
    elif path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise UserError(f"there is no model directory {model!r}")
