"""When steps are recorded; the recording itself needs a GPU, so one that only notes stands in."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch

from trio.engine import cuda_graphs
from trio.engine.cuda_graphs import Step, StepGraphs, is_out_of_memory, rounded_up


class Recorder:
    """Notes what is recorded and replayed; raises what `fails` says for a number of rows."""

    def __init__(self) -> None:
        self.recorded: list[int] = []
        self.replayed: list[int] = []
        self.fails: Callable[[int], Exception | None] = lambda rows: None

    def __call__(self, step: Step, rows: int) -> tuple[Callable[[], object], torch.Tensor]:
        error = self.fails(rows)
        if error is not None:
            raise error
        self.recorded.append(rows)
        out = step(rows)
        return lambda: self.replayed.append(rows), out


class Model:
    """Whose step notes that it ran."""

    def __init__(self) -> None:
        self.ran: list[int] = []

    def step(self, rows: int) -> torch.Tensor:
        self.ran.append(rows)
        return torch.full((rows,), float(rows))


def test_a_step_is_recorded_once_for_a_number_of_rows_and_a_generation() -> None:
    recorder, model = Recorder(), Model()
    graphs = StepGraphs(recorder)
    for rows, generation in ((4, 0), (4, 0), (8, 0), (4, 0), (4, 1)):
        assert graphs(model.step, rows, generation).tolist() == [rows] * rows
    assert recorder.recorded == [4, 8, 4] and recorder.replayed == [4, 4, 8, 4, 4]
    assert graphs.trouble is None


def test_graphs_hold_no_model() -> None:
    graphs, model = StepGraphs(Recorder()), Model()
    graphs(model.step, 2, 0)
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


def within(cause: Exception) -> RuntimeError:
    """As the end of a recording reports what broke it off."""
    error = RuntimeError("operation failed due to a previous error during capture")
    error.__context__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("no memory left"),
        RuntimeError("CUDA error: out of memory"),
        within(torch.OutOfMemoryError("no memory left")),
    ],
)
def test_where_memory_runs_out_fewer_rows_are_recorded_and_the_rest_later(
    error: RuntimeError, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cuda_graphs, "PATIENCE", 3)
    assert is_out_of_memory(error)
    recorder, model = Recorder(), Model()
    recorder.fails = lambda rows: error if rows > 8 else None
    graphs = StepGraphs(recorder)
    assert len(graphs(model.step, 16, 0)) == 16
    troubles = [graphs.trouble]
    assert len(graphs(model.step, 8, 0)) == 8 and recorder.recorded == [8]
    tried = []
    recorder.fails = lambda rows: tried.append(rows) or error  # type: ignore[func-returns-value]
    for rows in [24] * (3 + 1 + 5) + [20]:  # 16 are too many still
        graphs(model.step, rows, 0)
    assert tried == [24]
    troubles.append(graphs.trouble)
    recorder.fails = lambda rows: None
    graphs(model.step, 24, 0)
    assert recorder.recorded == [8, 24]
    troubles.append(graphs.trouble)
    assert troubles == [
        f"no memory for steps of {rows} rows and more, tried again later; smaller ones are recorded"
        for rows in (16, 16)
    ] + [None]
    assert len(caplog.messages) == 2


def test_what_cannot_be_recorded_runs_as_it_is() -> None:
    recorder, model = Recorder(), Model()
    recorder.fails = lambda rows: RuntimeError("not permitted when stream is capturing\nmore")
    graphs = StepGraphs(recorder)
    for _ in range(3):
        assert len(graphs(model.step, 2, 0)) == 2
        recorder.fails = lambda rows: None
    assert graphs.trouble == "not permitted when stream is capturing"
    assert recorder.recorded == [] and model.ran == [2, 2, 2]


def test_few_numbers_of_rows_serve_all() -> None:
    sizes = sorted({rounded_up(count, 256) for count in range(1, 257)})
    assert sizes == [1, 2, 4, 8, *range(16, 257, 8)]
    assert all(rounded_up(count, 300) >= count for count in range(1, 301))
    assert rounded_up(5, 6) == 6 and rounded_up(257, 1000) == 320
