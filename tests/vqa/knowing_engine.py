"""A stand-in for the engine that knows the answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tests.job.fakes import FakeEngine
from trio.engine.request import Prepared, Request
from trio.job.engines.engine_settings import EngineSettings

Answers = Mapping[tuple[int, str], str]


class KnowingEngine(FakeEngine):
    """Answers by row and prompt; any other is an error of preparation."""

    def __init__(self, answers: Answers) -> None:
        super().__init__()
        self._answers = answers

    def prepare(self, request: Request) -> Prepared:
        answer = self._answers[request.id, request.prompt]
        prepared = super().prepare(replace(request, prompt="asked"))
        self._said[id(prepared.input_ids)] = answer
        return prepared


def knowing(settings: EngineSettings, answers: Answers) -> list[KnowingEngine]:
    return [KnowingEngine(answers) for _ in settings.prunings]
