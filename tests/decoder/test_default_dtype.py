"""What dtype is taken where nobody says it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trio.decoder.default_dtype import has_matrix_units, on_a_cpu, on_a_gpu, saved_dtype

FLAGS = "processor\t: 0\nflags\t\t: fpu avx512_bf16{}\nbugs\t\t: spectre amx_bf16\n"


def cpuinfo(directory: Path, flags: str) -> Path:
    file = directory / "cpuinfo"
    file.write_text(FLAGS.format(flags) * 2)
    return file


@pytest.mark.parametrize(("flags", "there"), [(" amx_tile amx_bf16 amx_int8", True), ("", False)])
def test_half_precision_on_a_cpu_is_for_those_with_matrix_units(
    tmp_path: Path, flags: str, there: bool
) -> None:
    file = cpuinfo(tmp_path, flags)
    assert has_matrix_units(file) == there
    for saved in ("bfloat16", "float16"):
        name, why = on_a_cpu(saved, file)
        assert name == ("bfloat16" if there else "float32") and "amx_bf16" in why
    for other in ("float32", None):
        assert on_a_cpu(other, file)[0] == "float32"


def test_another_system_tells_of_no_matrix_units(tmp_path: Path) -> None:
    assert not has_matrix_units(tmp_path / "nothing")


@pytest.mark.parametrize("saved", ["float32", "float16", "bfloat16", None])
def test_gpus_compute_in_bfloat16(saved: str | None) -> None:
    name, why = on_a_gpu(saved)
    assert name == "bfloat16"
    assert (f"the checkpoint is {saved}" in why) == (saved in ("float32", "float16"))


@pytest.mark.parametrize(
    ("config", "saved"),
    [
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"text_config": {"torch_dtype": "torch.bfloat16"}}, "bfloat16"),
        ({"dtype": None, "text_config": {}}, None),
    ],
)
def test_what_a_config_says_of_its_checkpoint(config: dict[str, Any], saved: str | None) -> None:
    assert saved_dtype(config) == saved
