"""From a model's name to a model on its device."""

from __future__ import annotations

import logging
import os
import warnings
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.utils import cached_file

from trio import bundled, cgroups
from trio.decoder.decoder import Decoder
from trio.decoder.default_dtype import on_a_cpu, on_a_gpu, saved_dtype
from trio.decoder.weights import DTYPES, check_unquantised
from trio.engine.checkpoint_files import check_directory, check_files, check_tensors
from trio.engine.preprocess import Preprocessor
from trio.errors import UserError, explaining, first_line, kind_and_line
from trio.families.adapter import Adapter
from trio.families.pixel_limits import limit_images
from trio.families.registry import adapt, adapter_class
from trio.families.text_tower import TextTower
from trio.pruning.pruning_config import FILE as PRUNING_DEFAULTS

_log = logging.getLogger(__name__)
_FEWEST_TOKENS = 1024
"""Of a step, below which the default is not lowered."""


def load(
    model: str,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> tuple[Any, Any]:
    """Model and processor, see `Engine.from_pretrained`."""
    where = _device(device)
    kind = _asked_dtype(dtype)
    if model == bundled.NAME and (line := bundled.shadowed()):
        warnings.warn(line, stacklevel=3)
    model = _expanded(model)
    config = _config(model, revision)
    kind = kind or _default_dtype(model, config, where)
    _note_slow_dtype(kind, where)
    processor = _processor(model, config, revision)
    limit_images(processor, min_pixels=min_pixels, max_pixels=max_pixels)
    with _explaining("config.json or the weights", model, revision):
        found: Any = AutoModelForImageTextToText.from_pretrained(
            model,
            config=config,
            dtype=kind,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in `info` and refused there, by name
            **_which(revision),
        )
    loaded, info = found
    check_tensors(model, info)
    _fetch_pruning_defaults(model, config)
    return loaded.to(where).eval(), processor


def _fetch_pruning_defaults(model: str, config: Any) -> None:
    """The file of a hub id into the cache, where `adapt` finds it; most checkpoints have none.
    Without a network the cache stays as it is, and `defaults_of` says what follows."""
    if not os.path.isdir(model):
        try:
            cached_file(
                model,
                PRUNING_DEFAULTS,
                revision=getattr(config, "_commit_hash", None),
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
        except OSError as error:
            raise UserError(
                f"{PRUNING_DEFAULTS} of {model!r}: {first_line(error, None)}"
            ) from error


def load_text_tower(model: Any, source: str, revision: str | None = None) -> TextTower:
    """The text side of the CLIP that a loaded model's vision encoder was taken from.

    Args:
        model: on its device.
        source: directory or hub id.
        revision: of a hub id.

    Raises:
        UserError: nothing usable there, or it does not belong to the model's encoder.
    """
    adapter = adapt(model)
    if adapter.clip_tower is None:
        raise UserError(
            f"{type(model).__name__} has no CLIP vision encoder, so no text tower belongs to it"
        )
    decoder = adapter.decoder
    return TextTower.load(
        _expanded(source, bundled.CLIP),
        adapter.clip_tower,
        device=decoder.device,
        dtype=decoder.dtype,
        revision=revision,
    )


def load_outline(model: str, *, revision: str | None = None) -> tuple[Any, Any]:
    """Model without weights, on the meta device, and its processor: enough to count on.

    Raises:
        UserError: nothing usable there, or an architecture that is not supported.
    """
    model = _expanded(model)
    config = _config(model, revision)
    _fetch_pruning_defaults(model, config)
    return _outline(config), _processor(model, config, revision)


def load_processor(
    model: str,
    *,
    revision: str | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> Any:
    """The processor alone, for workers that only prepare requests.

    Images go through PIL wherever it runs: torchvision resizes differently, and a result must not
    depend on whether it happens to be installed.

    Args: as for `Engine.from_pretrained`.

    Raises:
        UserError: nothing usable there, or limits that the processor does not take.
    """
    return _limited(model, revision, {"min_pixels": min_pixels, "max_pixels": max_pixels})[0]


def load_preprocessor(
    model: str,
    *,
    revision: str | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    system: str | None = None,
) -> Preprocessor:
    """What prepares a model's requests, for processes that have neither its weights nor a device.

    Args: as for `Engine.from_pretrained`; `system` as for `Engine`.

    Raises:
        UserError: nothing usable there, or limits that the processor does not take.
    """
    limits = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    processor, family = _limited(model, revision, limits)
    return Preprocessor(processor, family, system)


def _limited(
    model: str, revision: str | None, limits: dict[str, int | None]
) -> tuple[Any, type[Adapter]]:
    model = _expanded(model)
    config = _config(model, revision)
    processor = _processor(model, config, revision)
    limit_images(processor, **limits)
    return processor, adapter_class(config)


def _outline(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, trust_remote_code=False).eval()


def _config(model: str, revision: str | None) -> Any:
    """A model's config, if it is one that can be served."""
    check_directory(model)
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False, **_which(revision))
    except OSError as error:
        raise UserError(f"no model at {model!r}: {first_line(error, None)}") from error
    except ValueError as error:
        raise UserError(
            f"config.json of {model!r} cannot be used: {first_line(error, None)} (a family of your "
            "own is registered by its adapter's module: trio.register, or a job's --adapters)"
        ) from error
    except Exception as error:  # what transformers raises over odd settings is not documented
        raise UserError(
            f"config.json of {model!r} cannot be used: {kind_and_line(error)}"
        ) from error
    if revision is not None and getattr(config, "_commit_hash", None) is None:
        config._commit_hash = revision  # noted by transformers before 5.24, read by `defaults_of`
    adapter_class(config)  # refuses what is not supported
    check_unquantised(config, repr(model))
    return config


def _processor(model: str, config: Any, revision: str | None) -> Any:
    kind = adapter_class(config).processor_class
    with _explaining("the processor", model, revision):
        processor = kind.from_pretrained(
            model, backend="pil", trust_remote_code=False, **_which(revision)
        )
    _fill_in(processor, config)
    return processor


def _explaining(what: str, model: str, revision: str | None) -> AbstractContextManager[None]:
    return explaining(f"{what} of {model!r}", look=partial(check_files, model, revision))


def _fill_in(processor: Any, config: Any) -> None:
    """What LLaVA's first checkpoints leave out of the processor stands in the model's config."""
    if getattr(processor, "patch_size", 0) is None:
        vision = config.vision_config
        processor.patch_size = vision.patch_size
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy
        processor.num_additional_image_tokens = int(vision.model_type == "clip_vision_model")


def _which(revision: str | None) -> dict[str, str]:
    return {} if revision is None else {"revision": revision}


def _device(device: str | torch.device | None) -> torch.device:
    """A device that is there; for None the GPU if there is one."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"{device!r} is no device; give cpu, cuda or cuda:0") from error
    if where.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {where} was asked for, but torch sees no CUDA device")
    if where.type == "meta":
        raise UserError("a model on device meta has no weights; give cpu or cuda")
    try:
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"no device {where} here: {first_line(error)}") from error
    return where


def _asked_dtype(dtype: str | torch.dtype | None) -> str | torch.dtype | None:
    """As transformers takes it; None where nothing is asked for."""
    if dtype is None:
        return None
    known: dict[Any, str | torch.dtype] = {
        str(kind).removeprefix("torch."): kind for kind in DTYPES
    }
    names = ", ".join(known)
    known |= {"auto": "auto"} | {kind: kind for kind in DTYPES}
    if not isinstance(dtype, str | torch.dtype) or dtype not in known:
        raise UserError(f"dtype {dtype!r} is none of auto, {names}")
    return known[dtype]


def _default_dtype(model: str, config: Any, where: torch.device) -> str | torch.dtype:
    """What is taken where nothing is asked for, said in one line unless it is the usual."""
    saved = saved_dtype(config.to_dict())
    if where.type == "cuda":
        if torch.cuda.get_device_capability(where) < (8, 0):
            return "auto"  # older ones have no bfloat16
        name, why = on_a_gpu(saved)
    else:
        name, why = on_a_cpu(saved)
    if name != (saved if where.type == "cuda" else "float32"):
        _log.warning("%s is loaded in %s: %s", model, name, why)
    return getattr(torch, name)


def _note_slow_dtype(kind: str | torch.dtype, where: torch.device) -> None:
    """A job decides without looking at its GPUs."""
    if kind != torch.bfloat16 or where.type != "cuda":
        return
    major, minor = torch.cuda.get_device_capability(where)
    if major < 8:
        _log.warning(
            "bfloat16 is slow on a GPU of compute capability %d.%d: --dtype float32 (dtype)",
            major,
            minor,
        )


def default_limits(decoder: Decoder, share: float = 1.0) -> tuple[int, int]:
    """Tokens of a step and running requests, `batch_tokens` and `max_running`; arguments as of
    `default_kv_bytes`. On a GPU a prefill takes half of the memory that is free at most."""
    device = decoder.device
    if device.type != "cuda":
        return 16384, 64
    _, total = torch.cuda.mem_get_info(device)
    tokens = usual = 65536 if total >= 64e9 else 16384
    free = _free(device, share)
    while tokens > _FEWEST_TOKENS and 2 * prefill_bytes(decoder, tokens) > free:
        tokens //= 2
    if tokens < usual:
        line = "batch_tokens is %d, not %d, as %.2f GB of the GPU are free for prompts and answers"
        _log.warning(line, tokens, usual, free / 1e9)
    return tokens, 256


def default_kv_bytes(decoder: Decoder, batch_tokens: int, share: float = 1.0) -> int:
    """Memory for keys and values: on a GPU 0.9 of what is free now, less what a prefill takes.

    Args:
        decoder: on its device, with the rest of the model.
        batch_tokens: most tokens of a prefill.
        share: of a GPU's memory, for all that this process has on it.
    """
    if decoder.device.type == "cuda":
        return max(0, _free(decoder.device, share) - prefill_bytes(decoder, batch_tokens))
    return min(cgroups.free_main_memory() // 4, 8 << 30)


def _free(device: torch.device, share: float) -> int:
    """0.9 of the bytes that this process may still take of a GPU."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    left = share * total - torch.cuda.memory_reserved(device)
    return int(min(free, left) * 0.9)


def prefill_bytes(decoder: Decoder, tokens: int) -> int:
    """What a prefill of so many tokens may take, by estimate: of each layer 4 tensors as wide as
    the hidden states and 3 as the MLP, and as much again for pruning, the encoder and gaps."""
    width = 4 * decoder.hidden_size + 3 * decoder.intermediate_size
    return 2 * tokens * width * decoder.dtype.itemsize


def _expanded(model: str, demo: Path = bundled.MODEL) -> str:
    """With `~` written out, which transformers would take for the name of a model, and the place of
    the bundled one (`demo`) for its name."""
    return os.path.expanduser(bundled.directory_of(model, demo))
