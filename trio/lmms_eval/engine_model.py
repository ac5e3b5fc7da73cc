"""lmms-eval's model `trio_vlm`. Importable only where lmms-eval is installed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from lmms_eval.api.instance import GenerationResult  # type: ignore[import-not-found]
from lmms_eval.api.model import lmms  # type: ignore[import-not-found]
from rich.console import Console
from rich.progress import track

from trio.engine.engine import Engine
from trio.engine.request import Prepared, Request, Result, Sampling
from trio.errors import UserError
from trio.families.registry import register_adapters
from trio.lmms_eval.entry_point import NAME
from trio.lmms_eval.gen_kwargs import cut, read_generation
from trio.lmms_eval.model_args import read_model_args
from trio.lmms_eval.rows import Question, Row, grouped, served, warn_of_marks


class Score(tuple[float, bool], GenerationResult):
    """A pair as lmms-eval's interface has it; its evaluator (0.7.3) turns a bare one into text."""


class TrioVlm(lmms):
    """The engine as a model of lmms-eval: each kind of request goes to it as a whole.

    `model_args`: of the command line, with its batch_size and device.

    Raises:
        UserError: arguments that cannot be, or several processes.
    """

    is_simple = True

    def __init__(self, **model_args: Any) -> None:
        super().__init__()
        _check_alone(os.environ)
        args = read_model_args(model_args)
        self._settings = args.settings
        model = args.settings.model
        register_adapters(model.adapters)
        self._engine = Engine.from_pretrained(model.model, **args.engine_options())

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Of each request of lmms-eval its answer, cut at the task's stop strings.

        Raises:
            UserError: a setting or a visual that is not followed, or a row without an answer.
        """
        rows = [_row(prompt, *where) for prompt, _, _, *where in _arguments(requests)]
        warn_of_marks([row.prompt for row in rows])
        base, seed = self._settings.sampling, self._settings.seed
        modes = [
            read_generation(given or {}, base, seed + place)
            for place, (_, given, *_) in enumerate(_arguments(requests))
        ]

        def asked() -> Iterator[Request]:
            for place, (_, _, look, *_) in enumerate(_arguments(requests)):
                row, sampling = rows[place], modes[place].sampling
                images = row.pictures(self.task_dict, look)
                yield Request(prompt=row.prompt, images=images, id=place, sampling=sampling)

        answers: dict[int, str] = {}
        for result in self._results(asked(), len(rows)):
            answer = served(result, rows[result.id]).response or ""
            answers[result.id] = cut(answer, modes[result.id].stops)
        return [answers[place] for place in range(len(rows))]

    def loglikelihood(self, requests: Sequence[Any]) -> list[Score]:
        """Of each request its answer's score, and whether the engine's greedy answer begins so.

        The score is the sum of the tokens' log-probabilities for tasks of type loglikelihood. Of
        those of type multiple_choice it is minus that: they choose the smallest, as the models of
        lmms-eval give losses.

        Raises:
            UserError: a visual that is not read, or a row that cannot be scored.
        """
        signs, asked = [], []
        for arguments in _arguments(requests):
            if len(arguments) == 2:
                raise UserError(f"{NAME}: acc_mutual_info is not followed: no row is named for it")
            prompt, target, look, *where = arguments
            row = _row(prompt, *where)
            signs.append(-1.0 if isinstance(target, str) else 1.0)
            asked.append((row, look, _answer(target, self.task_dict, row)))
        questions = grouped(asked)
        warn_of_marks([question.row.prompt for question in questions])
        scores: dict[int, Score] = {}
        for place, total, greedy in self._scored(questions):
            scores[place] = Score((signs[place] * total, greedy))
        return [scores[place] for place in range(len(asked))]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> NoReturn:
        raise UserError(f"{NAME}: generate_until_multi_round is not supported")

    def generate_visual_cot(self, requests: Sequence[Any]) -> NoReturn:
        raise UserError(f"{NAME}: generate_visual_cot is not supported: it makes no pictures")

    @property
    def chat_template(self) -> NoReturn:
        raise UserError("--apply_chat_template: the engine applies the model's own; leave it out")

    def _scored(self, questions: Sequence[Question]) -> Iterator[tuple[int, float, bool]]:
        """Place, sum of log-probabilities and greediness of each answer, as questions finish."""
        tokens: dict[int, dict[str, tuple[int, ...]]] = {}
        scored: dict[int, Result] = {}
        greedy: dict[int, Result] = {}

        def asked() -> Iterator[Prepared]:
            for number, question in enumerate(questions):
                prepared = self._prepared(question)
                tokens[number] = dict(zip(question.candidates, prepared.candidates, strict=True))
                longest = max(map(len, prepared.candidates))
                yield replace(prepared, id=(number, scored))
                yield replace(
                    prepared,
                    id=(number, greedy),
                    candidates=(),
                    sampling=Sampling(max_new_tokens=longest),
                )

        for result in self._results(asked(), 2 * len(questions)):
            number, kind = result.id
            question = questions[number]
            kind[number] = served(result, question.row)
            if number in scored and number in greedy:
                own = tokens.pop(number)
                said = tuple(greedy.pop(number).token_ids)
                sums = map(sum, scored.pop(number).candidate_logprobs)
                totals = dict(zip(question.candidates, sums, strict=True))
                for place, text in question.places:
                    yield place, totals[text], said[: len(own[text])] == own[text]

    def _prepared(self, question: Question) -> Prepared:
        row = question.row
        images = row.pictures(self.task_dict, question.look)
        request = Request(prompt=row.prompt, images=images, candidates=question.candidates)
        prepared = self._engine.prepare(request)
        if isinstance(prepared, Result):
            served(prepared, row)
        assert isinstance(prepared, Prepared)
        return prepared

    def _results(self, asked: Iterator[Request | Prepared], total: int) -> Iterator[Result]:
        results = self._engine.generate(asked)
        yield from track(results, description=NAME, total=total, console=Console(stderr=True))


def _arguments(requests: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    return (request.args for request in requests)


def _row(prompt: str, doc_id: Any, task: str, split: str) -> Row:
    return Row(prompt=prompt, task=task, split=split, doc_id=doc_id)


def _answer(target: Any, documents: Mapping[str, Any], row: Row) -> str:
    """The answer to be scored: text, or a function of the document."""
    if not callable(target):
        return str(target)
    return str(target(documents[row.task][row.split][row.doc_id]))


def _check_alone(environment: Mapping[str, str]) -> None:
    """Several processes would all take the first GPU, and score padding rows."""
    if int(environment.get("WORLD_SIZE", 1)) > 1:
        raise UserError(
            f"{NAME}: several processes are not supported; start one, without accelerate and "
            "torchrun"
        )
