"""Settings are checked once, when they are made."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trio.errors import UserError
from trio.pruning.options import Pruning
from trio.pruning.pruning_config import PruningDefaults
from trio.pruning.schedule import PUBLISHED_AFTER_ENCODER, Schedule, tokens_per_layer


def test_nothing_given_prunes_nothing() -> None:
    assert not Pruning().active
    assert Pruning().stages(576, 32) == []
    assert not Pruning(retention=1.0).active
    assert not Pruning(retention=0.1, method="none").active
    assert Pruning(retention=0.1, method="none").stages(576, 32) == []


def test_retention_and_schedule_lead_to_the_same_stages() -> None:
    by_retention = Pruning(retention=1 / 9).stages(576, 32)
    assert by_retention == Pruning(schedule="1:92,10:54,15:22").stages(576, 32)
    assert by_retention == Pruning(schedule=Schedule.parse("1:92,10:54,15:22")).stages(576, 32)
    assert Pruning(retention=1 / 9).stages(0, 32) == []


def test_a_schedule_too_deep_for_the_model() -> None:
    with pytest.raises(UserError, match="decoder has 8 layers"):
        Pruning(schedule="1:92,10:54").stages(576, 8)


def test_the_proxys_layer_decides_which_stages_there_can_be() -> None:
    assert Pruning(schedule="0:9,7:5").stages(64, 8) == [(0, 9), (7, 5)]
    with pytest.raises(UserError, match="last possible stage is at 7"):
        Pruning(schedule="8:9").stages(64, 8)
    previous = Pruning(schedule="1:9,8:5", proxy_layer="previous")
    assert previous.stages(64, 8) == [(1, 9), (8, 5)]
    with pytest.raises(UserError, match="last possible stage is at 7"):
        previous.stages(64, 7)
    with pytest.raises(UserError, match="begin at layer 1, or set proxy_layer to next"):
        Pruning(schedule="0:9,7:5", proxy_layer="previous")
    assert Pruning(retention=1 / 9, proxy_layer="previous").stages(576, 32)[0] == (1, 92)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"retention": 0.0}, "retention must be"),
        ({"retention": 2}, "retention must be"),
        ({"retention": "0.1"}, "retention must be"),
        ({"schedule": [(1, 92)]}, r"trio\.Schedule or text"),
        ({"retention": 0.5, "schedule": "1:5"}, "not both"),
        (
            {"method": "fastest"},
            "trio, none, .*fastv, .*, or module:Class",
        ),
        ({"proxy_positions": "first"}, "reference, with_last, last"),
        ({"proxy_layer": "last"}, "next, previous"),
        ({"proxy_head": "lm_head"}, "output, input_embedding"),
        ({"position_ids": "shift"}, "renumber, keep"),
        ({"similarity_threshold": 1.5}, "similarity_threshold"),
        ({"fill_up": "saliency"}, "mixed, reference"),
        ({"schedule": "1"}, "not layer:keep"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Pruning(**settings)


def test_encoder_and_decoder_share_the_budget() -> None:
    both = Pruning(retention=1 / 9, encoder="visionzip")
    assert (both.encoded(576, 32), both.stages(576, 32)) == (256, [(4, 64), (10, 40), (16, 25)])
    # TRIO's settings: 576 -> 96 in the encoder, then 32 at half depth.
    published = Pruning(
        retention=1 / 9, encoder="visionzip", schedule_shape=PUBLISHED_AFTER_ENCODER
    )
    assert (published.encoded(576, 32), published.stages(576, 32)) == (96, [(16, 32)])
    assert (published.encoded(576, 28), published.stages(576, 28)) == (96, [(14, 32)])
    alone = Pruning(retention=1 / 9, encoder="scan", method="none")
    assert alone.active
    assert (alone.encoded(576, 32), alone.stages(576, 32)) == (64, [])
    by_hand = Pruning(schedule="0:96,16:32", encoder="visionzip")
    assert (by_hand.encoded(576, 32), by_hand.stages(576, 32)) == (96, [(16, 32)])
    assert Pruning(retention=1 / 9).encoded(576, 32) == 576


@pytest.mark.parametrize("method", ["divprune", "eadp"])
def test_before_the_decoder_there_is_one_stage(method: str) -> None:
    alone = Pruning(retention=1 / 9, method=method)
    assert (alone.encoded(576, 32), alone.stages(576, 32)) == (576, [(0, 64)])
    behind = Pruning(retention=1 / 9, method=method, encoder="scan")
    assert (behind.encoded(576, 32), behind.stages(576, 32)) == (256, [(0, 64)])


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["trio", "divprune", "none"]),
    st.sampled_from(["none", "visionzip"]),
    st.floats(1 / 16, 0.95),
)
def test_layer_average_is_the_retention(method: str, encoder: str, retention: float) -> None:
    pruning = Pruning(retention=retention, method=method, encoder=encoder)
    if pruning.active:
        layers = tokens_per_layer(pruning.encoded(576, 16), pruning.stages(576, 16), 16)
        assert sum(layers) / 16 == pytest.approx(576 * retention, abs=1)


def test_what_is_not_given_is_known_apart_from_the_same_value_given() -> None:
    """So that a checkpoint's defaults replace the one and not the other."""
    defaults = PruningDefaults(choices={"proxy_positions": "last", "similarity_threshold": 0.5})
    assert defaults.fill(Pruning()).proxy_positions == "last"
    assert defaults.fill(replace(Pruning(), seed=1)).similarity_threshold == 0.5
    for chosen in (
        Pruning(proxy_positions="reference", similarity_threshold=0.8),
        replace(Pruning(), proxy_positions="reference", similarity_threshold=0.8),
        PruningDefaults().fill(Pruning()),
    ):
        found = defaults.fill(pickle.loads(pickle.dumps(chosen)))
        assert (found.proxy_positions, found.similarity_threshold) == ("reference", 0.8)
    left_open = defaults.fill(pickle.loads(pickle.dumps(Pruning())))
    assert left_open.proxy_positions == "last" and type(left_open.proxy_head) is str
