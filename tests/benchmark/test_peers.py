"""`benchmark.py peers`: what becomes of subjects that answer, that do not, and that end; whether
ours answer the same requests alike. The subjects here are plain Python in processes of their own.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import benchmark
import pytest
import torch

from trio import openmp
from trio.benchmark import peers_command
from trio.benchmark.speed.peers import own_subjects, subject_process
from trio.benchmark.speed.peers.checkpoint_of_shape import write_checkpoint
from trio.benchmark.speed.peers.peer_rounds import compare, table
from trio.benchmark.speed.peers.requests_on_disk import write_requests
from trio.benchmark.speed.peers.subject_process import Subject

ANSWERS = "[{'prompt_tokens': 9, 'output_tokens': 2, 'text': one['prompt']} for one in requests]"
WAYS = {
    "good": "",
    "spaced": "answers = [{**one, 'text': ' ' + one['text'] + ' '} for one in answers]",
    "other": "answers[0]['text'] = 'else'",
    "ends": "if seen == 2: sys.exit('one line\\nout of memory')",
    "longer": "answers[0]['prompt_tokens'] = 10",
    "few": "answers = answers[1:]",
    "short": "answers[0]['output_tokens'] = 1",
    "hangs": "if seen == 1: time.sleep(60)",
    "absent": "",
}
ABSENT = "atexit.register(sys.stderr.write, 'leaked'); raise RuntimeError('no such wheel')"
TASK = {"output_tokens": 2}
REQUESTS = [[{"prompt": f"{number} {place}"} for place in range(2)] for number in range(3)]


@pytest.fixture
def subject(tmp_path: Path) -> Any:
    """A subject that answers in one of `WAYS`, and prints where only its answers belong."""

    def made(name: str, way: str) -> Subject:
        start = ABSENT if way == "absent" else "print('loading')"
        (tmp_path / f"{way}.py").write_text(
            "import atexit, sys, time\n"
            "def load(task):\n"
            "    seen = -1\n"
            f"    {start}\n"
            "    def answer(requests):\n"
            "        nonlocal seen\n"
            "        seen += 1\n"
            "        print('answering')\n"
            f"        answers = {ANSWERS}\n"
            f"        {WAYS[way]}\n"
            "        return answers\n"
            "    return answer\n"
        )
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        return Subject(
            name=name, python=sys.executable, module=way, environment=environment, options={}
        )

    return made


def results(subjects: list[Subject], told: list[str]) -> Iterator[dict[str, Any]]:
    return compare(subjects, TASK, REQUESTS, told.append)


def test_every_subject_has_a_turn_a_round_and_the_first_is_not_counted(subject: Any) -> None:
    told: list[str] = []
    given = [("generate", "good"), ("engine", "spaced"), ("vllm", "other")]
    first, last = results([subject(*one) for one in given], told)
    assert [len(result["rounds"]) for result in (first, last)] == [1, 2]
    rows = {row["name"]: row for row in last["rows"]}
    assert list(rows) == ["generate", "engine", "vllm"] and not last["failed"]
    assert [row["answers_as_generate"] for row in rows.values()] == [1, 1, 0.5]
    assert rows["generate"]["vs_generate"] == rows["vllm"]["vs_vllm"] == 1
    seconds = [turns["seconds"] for turns in last["rounds"]]
    ratios = [one["vllm"] / one["engine"] for one in seconds]
    assert rows["engine"]["vs_vllm_range"] == (min(ratios), max(ratios))
    assert rows["engine"]["vs_vllm"] == pytest.approx(sum(ratios) / 2)
    rates = [2 / one["engine"] for one in seconds]
    assert rows["engine"]["tokens_per_s"] == pytest.approx(sum(rates))
    assert all(turns["others_cpu_s"] >= 0 for turns in last["rounds"])
    assert all(used >= 0 for turns in last["rounds"] for used in turns["cpu_s"].values())
    assert [line.partition(":")[0] for line in told[3:]] == [
        "the warm-up",
        "round 1/2",
        "round 2/2",
    ]
    shown = table(last)
    assert "of vllm" in shown and "round 2: 0 s, others used" in shown and "differ" not in shown


def test_those_that_fail_are_told_with_their_last_line_and_the_others_go_on(subject: Any) -> None:
    told: list[str] = []
    given = ["good", "longer", "absent", "ends", "few", "short"]
    *_, last = results([subject(way, way) for way in given], told)
    assert [row["name"] for row in last["rows"]] == ["good", "longer"]
    assert last["failed"] == {
        "absent": "did not start: RuntimeError: no such wheel",
        "ends": "failed in round 2/2: out of memory",
        "few": "failed in the warm-up: gave 1 answers to 2 requests",
        "short": "failed in the warm-up: gave an answer of 1 tokens instead of 2",
    }
    assert last["logs"]["ends"][-2:] == ["one line", "out of memory"]
    assert [f"{name} {what}" for name, what in last["failed"].items()] == [
        line for line in told if "fail" in line or "not start" in line
    ]
    assert set(last["rounds"][0]["seconds"]) == {"good", "longer", "ends"}
    shown = table(last)
    assert "of generate" not in shown and "prompt tokens differ" in shown


def test_one_that_hangs_is_ended_with_what_it_has_started(
    subject: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject_process, "ANSWER_LIMIT_S", 0.3)
    monkeypatch.setattr(subject_process, "_END_S", 0.1)
    started: list[int] = []
    begin = subject_process.subprocess.Popen

    def note(*args: Any, **options: Any) -> Any:
        started.append((process := begin(*args, **options)).pid)
        return process

    monkeypatch.setattr(subject_process.subprocess, "Popen", note)
    first, last = results([subject("vllm", "hangs"), subject("engine", "good")], [])
    assert first["failed"] == {"vllm": "failed in round 1/2: said nothing for 0.3 s"}
    assert [row["name"] for row in last["rows"]] == ["engine"]
    assert not any(Path(f"/proc/{process}").exists() for process in started)


@pytest.mark.parametrize(("way", "code"), [("good", 0), ("absent", 1)])
def test_the_command_writes_each_round_and_says_by_its_code_whether_all_ran(
    subject: Any, way: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subjects = [subject("generate", "good"), subject("vllm", way)]
    monkeypatch.setattr(peers_command.Peers, "_subjects", lambda self: subjects)
    monkeypatch.setattr(peers_command.Peers, "_prepared", lambda self, base: (TASK, REQUESTS))
    file = tmp_path / "x.json"
    assert benchmark.main(["peers", "--shape", "tiny", "--json", str(file)]) == code
    written = json.loads(file.read_text())
    assert written["conditions"]["dtype"] == "float32" and len(written["rounds"]) == 2
    assert set(written["failed"]) == ({"vllm"} if code else set())


def test_ours_answer_the_same_files_alike(tmp_path: Path) -> None:
    write_checkpoint("tiny", tmp_path / "model", torch.float32)
    model = str(tmp_path / "model")
    (requests,) = write_requests(model, tmp_path, rounds=1, images=2, prompt_tokens=8, seed=0)
    task = {"model": model, "dtype": "float32", "threads": 1, "images": 2, "output_tokens": 3}
    answers = [
        own_subjects.load({**task, "retention": kept})(requests) for kept in (None, 1, 1 / 9)
    ]
    generated, unpruned, pruned = answers
    assert [one["text"].strip() for one in generated] == [one["text"] for one in unpruned]
    # The start, an image, and words; the rest is of the chat template.
    assert {one["prompt_tokens"] for each in answers for one in each} == {1 + 144 + 8 + 18}
    assert [one["output_tokens"] for one in pruned] == [3, 3]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--peer", "llama=python3"], "--peer: 'llama=python3' is not NAME=PYTHON with a name of"),
        (["--peer", "vllm"], "--peer: 'vllm' names no interpreter; give vllm=PYTHON"),
        (["--peer", "vllm=./nowhere/python"], "vllm: no interpreter './nowhere/python'"),
        (["--peer", f"vllm={sys.executable}"] * 2, "an engine is named twice"),
        (["--shape", "qwen3-vl-8b"], "--shape qwen3-vl-8b is not written for other engines"),
    ],
)
def test_mistakes_end_with_code_2_and_one_line(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark.main(["peers", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_dry_run_names_the_subjects(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--peer", f"vllm={sys.executable}", "--dry-run"]
    assert benchmark.main(["peers", "--shape", "tiny", *flags]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "generate", "engine", "engine pruned", "vllm"
    ]  # fmt: skip


def waiting_of_subjects(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, str]]:
    """By subject, how its process is told to let threads wait."""
    found: dict[str, dict[str, str]] = {}
    subjects = peers_command.Peers._subjects

    def seen(self: Any) -> list[Subject]:
        for one in (made := subjects(self)):
            environment = dict(one.environment)
            found[one.name] = {k: environment[k] for k in openmp.CHOICES if k in environment}
        return made

    monkeypatch.setattr(peers_command.Peers, "_subjects", seen)
    flags = ["--peer", f"vllm={sys.executable}", "--dry-run"]
    assert benchmark.main(["peers", "--shape", "tiny", *flags]) == 0
    return found


def test_only_our_engine_waits_passively_unless_the_user_says_how(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in openmp.CHOICES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(openmp, "_set_here", False)
    openmp.passively()
    ours, theirs = ("engine", "engine pruned"), ("generate", "vllm")
    passive: dict[str, str] = {openmp.POLICY: openmp.PASSIVE}
    found = waiting_of_subjects(monkeypatch)
    assert found == dict.fromkeys(ours, passive) | {name: {} for name in theirs}
    monkeypatch.delenv(openmp.POLICY)
    monkeypatch.setenv("GOMP_SPINCOUNT", "30000")
    monkeypatch.setattr(openmp, "_set_here", False)
    found = waiting_of_subjects(monkeypatch)
    assert found == {name: {"GOMP_SPINCOUNT": "30000"} for name in (*ours, *theirs)}
