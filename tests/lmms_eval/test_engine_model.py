"""The class, over lmms-eval's base class or, where that is not installed, a stand-in of the same
shape; `test_real_run.py` has lmms-eval itself."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pyarrow.parquet as pq
import pytest
from PIL import Image

from trio.bundled import SHARD
from trio.engine.request import Request
from trio.errors import UserError

MODULE = "trio.lmms_eval.engine_model"
GREEDY = {"max_new_tokens": 24, "temperature": 0, "do_sample": False, "until": ["\n\n"]}
ROWS = pq.read_table(SHARD).slice(0, 8).to_pylist()


class Base:
    def __init__(self) -> None:
        self.task_dict: dict[str, Any] = {}


class Wrapped:
    def __init__(self, text: Any, token_counts: Any = None) -> None:
        self.text, self.token_counts = text, token_counts


def stand_in(name: str, **content: Any) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(content)
    return made


@pytest.fixture(scope="module")
def trio_vlm() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        if find_spec("lmms_eval") is None:
            for name in ("lmms_eval", "lmms_eval.api"):
                patch.setitem(sys.modules, name, stand_in(name))
            instance = stand_in("lmms_eval.api.instance", GenerationResult=Wrapped)
            patch.setitem(sys.modules, instance.__name__, instance)
            model = stand_in("lmms_eval.api.model", lmms=Base)
            patch.setitem(sys.modules, model.__name__, model)
        yield import_module(MODULE).TrioVlm
    sys.modules.pop(MODULE)


@pytest.fixture(scope="module")
def model(trio_vlm: Any) -> Any:
    made = trio_vlm(pretrained="demo", retention="1/9", device="cpu", dtype="float32", batch_size=1)
    made.task_dict = {"scenes": {"test": ROWS}}
    return made


def visuals(row: dict[str, Any]) -> list[Image.Image]:
    return [Image.open(io.BytesIO(row["image"]["bytes"]))]


def request(doc_id: int, second: Any, look: Any = visuals) -> Any:
    return SimpleNamespace(args=(ROWS[doc_id]["prompt"], second, look, doc_id, "scenes", "test"))


def answers(model: Any, rows: list[int]) -> list[str]:
    """The engine's own, of each row by itself."""
    asked = [Request(prompt=ROWS[n]["prompt"], images=tuple(visuals(ROWS[n]))) for n in rows]
    return [next(iter(model._engine.generate([one]))).response for one in asked]


def test_answers_are_the_engines_in_the_order_of_the_requests(model: Any) -> None:
    order = [5, 0, 3, 1, 2, 0]
    assert model.generate_until([request(n, GREEDY) for n in order]) == answers(model, order)


def test_all_requests_go_to_the_engine_at_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = Mock(side_effect=model._engine.generate)
    monkeypatch.setattr(model._engine, "generate", generate)
    assert len(model.generate_until([request(n, GREEDY) for n in range(8)])) == 8
    generate.assert_called_once()


def test_answers_end_at_stop_strings(model: Any) -> None:
    whole = answers(model, [0])[0]
    assert " and " in whole
    (cut,) = model.generate_until([request(0, GREEDY | {"until": [" and "]})])
    assert cut == whole.split(" and ")[0]


def test_a_row_without_an_answer_stops_the_evaluation(model: Any) -> None:
    long = request(1, GREEDY, lambda _: [Image.new("RGB", (1, 400))])
    with pytest.raises(UserError, match="task scenes, row 1: image"):
        model.generate_until([request(0, GREEDY), long])
    with pytest.raises(UserError, match="task scenes, row 1: image"):
        model.loglikelihood([SimpleNamespace(args=(*long.args[:1], " yes", *long.args[2:]))])


def test_scores_of_choices_are_losses_and_of_targets_log_probabilities(model: Any) -> None:
    row = next(n for n, one in enumerate(ROWS) if one["kind"] == "presence")
    texts = (" yes", " no")
    question = Request(
        prompt=ROWS[row]["prompt"], images=tuple(visuals(ROWS[row])), candidates=texts
    )
    (result,) = model._engine.generate([question])
    sums = [math.fsum(own) for own in result.candidate_logprobs]
    choices = model.loglikelihood([request(row, text) for text in texts])
    assert [score for score, _ in choices] == pytest.approx([-total for total in sums])
    (said,) = answers(model, [row])
    assert [greedy for _, greedy in choices] == [said == "yes", said == "no"]
    (target,) = model.loglikelihood([request(row, lambda document: " yes")])
    assert target[0] == pytest.approx(sums[0])


def test_greedy_is_what_the_greedy_answer_begins_with(model: Any) -> None:
    (said,) = answers(model, [0])
    tried = [said, said.split()[0], f"{said} and", f"{said.split()[0]} dog"]
    scored = model.loglikelihood([request(0, text) for text in tried])
    assert [greedy for _, greedy in scored] == [True, True, False, False]


def test_answers_about_one_row_share_one_prefill(model: Any) -> None:
    model._engine.stats(reset=True)
    asked = [request(n, text) for text in (" yes", " no", " red") for n in (1, 3)]
    scores = model.loglikelihood(asked)
    assert model._engine.stats()["requests"] == 4  # of each row, the scores and the greedy answer
    again = [model.loglikelihood([one])[0] for one in asked]
    assert [score for score, _ in scores] == pytest.approx([score for score, _ in again])


def test_a_score_is_a_pair_that_the_evaluator_does_not_turn_into_text(model: Any) -> None:
    (score,) = model.loglikelihood([request(1, " yes")])
    assert isinstance(score, tuple)
    assert vars(score) == {"text": score} | {"token_counts": None}


@pytest.mark.parametrize("kind", ["generate_until_multi_round", "generate_visual_cot"])
def test_other_kinds_are_refused_by_name(model: Any, kind: str) -> None:
    with pytest.raises(UserError, match=f"trio_vlm: {kind} is not supported"):
        getattr(model, kind)([])


def test_further_refusals(model: Any, trio_vlm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="acc_mutual_info"):
        model.loglikelihood([SimpleNamespace(args=("", " yes"))])
    with pytest.raises(UserError, match="--apply_chat_template"):
        _ = model.chat_template
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="several processes"):
        trio_vlm(pretrained="demo")
