"""`--model_args`: the names, and that the jobs' flags read the values."""

from __future__ import annotations

from typing import Any

import pytest

from trio.errors import UserError
from trio.lmms_eval.model_args import MAX_NEW_TOKENS, read_model_args


def options(**given: Any) -> dict[str, Any]:
    return read_model_args({"pretrained": "demo", **given}).engine_options()


@pytest.mark.parametrize("written", [0.111, "0.111"])
def test_a_retention_may_be_a_number_or_text(written: object) -> None:
    assert options(retention=written)["pruning"].retention == 0.111


def test_values_are_read_as_flags_are() -> None:
    made = options(
        retention="1/9",
        encoder="visionzip",
        method="none",
        max_running=8,
        system_prompt="Be brief.",
    )
    assert made["pruning"].retention == 1 / 9
    assert (made["pruning"].encoder, made["pruning"].method) == ("visionzip", "none")
    assert (made["max_running"], made["system"]) == (8, "Be brief.")
    assert "batch_tokens" not in made


def test_quotes_keep_commas_together() -> None:
    assert str(options(schedule='"1:92,10:54"')["pruning"].schedule) == "1:92,10:54"


def test_auto_leaves_the_dtype_to_the_device() -> None:
    assert options()["dtype"] is None
    assert options(dtype="float32")["dtype"] == "float32"


def test_without_retention_nothing_is_pruned() -> None:
    assert not options()["pruning"].active
    assert options()["sampling"].max_new_tokens == MAX_NEW_TOKENS


def test_the_demo_brings_its_own_text_tower() -> None:
    assert options(method="eadp", retention=0.2)["text_tower"] == "demo"
    assert options(method="trio", retention=0.2)["text_tower"] is None


def test_the_device_may_come_from_the_command_line() -> None:
    assert options(device="cuda:1", batch_size="1")["device"] == "cuda:1"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"retenion": 0.1}, r"unknown name 'retenion' \(did you mean 'retention'\?\)"),
        ({"retention": 2}, "retention: must be above 0 and at most 1, got 2$"),
        ({"revision": 1234567}, r'revision: expected text.*put it in quotes, revision="\.\.\."'),
        ({"method": "divprune"}, "method=divprune keeps every token without retention or schedule"),
        ({"retention": 0.1, "schedule": "1:92"}, "exclude each other"),
        ({"batch_size": "auto"}, "batch_size auto: the engine fills its batches itself"),
        ({"dtype": "int8"}, "dtype: unknown value 'int8'"),
        ({"model": "demo"}, "unknown name 'model'"),
    ],
)
def test_what_cannot_be_is_refused_by_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        options(**given)


def test_a_model_must_be_given() -> None:
    with pytest.raises(UserError, match="pretrained is missing"):
        read_model_args({"retention": 0.1, "batch_size": 1})
