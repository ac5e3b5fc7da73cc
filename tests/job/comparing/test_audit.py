"""Rows that are asked unpruned as well: which, what is said of them, and how sure that is."""

import json
from pathlib import Path
from typing import Any

import caption
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from trio.bundled import SHARD
from trio.engine.engine import Engine
from trio.engine.request import Result
from trio.errors import UserError
from trio.job.command import main
from trio.job.comparing.audit import COLUMNS, Audit, audit_summary, columns_of, described, overlap
from trio.job.images.policy import RowError
from trio.job.settings import made_of

ROWS, RATE = 12, 0.5
FEW_TOKENS = "3/100"
"""A retention at which the bundled model changes some of its answers."""


def result(**values: Any) -> Result:
    return Result(**{"id": None, "finish_reason": "stop"} | values)


def row(number: int, match: bool | None, **values: Any) -> dict[str, Any]:
    found = dict.fromkeys(COLUMNS) | {"error": None, "picture": f"p{number // 2}"}
    return found | {"audit_match": match} | values


def test_rows_are_chosen_by_seed_and_row_alone() -> None:
    chosen = {key for key in range(4000) if Audit(rate=0.1, seed=1).chooses(key)}
    assert 320 < len(chosen) < 480
    assert chosen == {key for key in reversed(range(4000)) if Audit(rate=0.1, seed=1).chooses(key)}
    others = {key for key in range(4000) if Audit(rate=0.1, seed=2).chooses(key)}
    assert 10 < len(chosen & others) < 80
    assert chosen <= {key for key in range(4000) if Audit(rate=0.2, seed=1).chooses(key)}
    repeated = sum(Audit(rate=0.1, seed=1).repeats(key) for key in chosen)
    assert 0.15 < repeated / len(chosen) < 0.35


def test_what_is_said_of_a_row() -> None:
    pruned = result(token_ids=[1, 2, 3], first_logprobs=torch.tensor([0.5, 0.5]).log())
    unpruned = result(token_ids=[1, 2, 9, 9], first_logprobs=torch.tensor([0.25, 0.75]).log())
    again = result(token_ids=[1, 2, 9, 8])
    forced = result(finish_reason="scored", candidate_is_top=[[True, True, False]])
    said = columns_of(pruned, unpruned, again, forced, ("a b", "a c"))
    kl = 0.25 * np.log(0.25 / 0.5) + 0.75 * np.log(0.75 / 0.5)
    assert said.pop("audit_kl") == pytest.approx(kl)
    assert said.pop("audit_top1") == pytest.approx(2 / 3)
    assert said == {
        "audit_response": "a c",
        "audit_match": False,
        "audit_overlap": 0.5,
        "audit_repeat_match": False,
    }
    once = columns_of(pruned, unpruned, None, None, ("a", "a"))
    assert once["audit_match"] and once["audit_repeat_match"] is None and once["audit_top1"] is None


def test_an_outcome_that_is_certain_is_no_divergence_without_end() -> None:
    certain = result(first_logprobs=torch.tensor([0.0, -float("inf")]))
    said = columns_of(certain, certain, None, None, ("a", "a"))
    assert said["audit_kl"] == 0


@pytest.mark.parametrize(
    "failed",
    [RowError("prompt", "x"), result(finish_reason="error", error="no_room: does not fit")],
)
def test_a_row_that_fits_only_pruned_is_not_auditable(failed: Any) -> None:
    said = columns_of(result(token_ids=[1]), failed, None, None, ("a", None))
    assert list(said) == ["audit_error"] and said["audit_error"].startswith("not auditable: ")
    rows = [row(0, True), row(1, None, **said), row(2, None), row(3, None, error="image: x")]
    rows = [one for one in rows if one["error"] is None]
    found = audit_summary(rows, 0.5, 2.0, of_rows=3)
    assert (found["rows"], found["not_auditable"], found["of_rows"]) == (1, 1, 3)
    assert "1 not auditable" in described(found)


def test_tokens_in_common() -> None:
    assert overlap([1, 1, 2], [1, 2, 2]) == pytest.approx(2 / 3)
    assert overlap([1], [1]) == 1 and overlap([1], []) == 0 and overlap([], []) is None


def test_nothing_audited_is_said_so() -> None:
    found = audit_summary([], 0.01, 0.0, of_rows=9)
    assert found["agreement"] is None and described(found) == "audit: 0 rows, 0.0 s"


@pytest.mark.parametrize("changed", [0, 1, 5, 50, 200])
def test_the_interval_holds_the_share_over_all_rows(changed: int) -> None:
    """Over many selections from one population of 1,000 rows, two a picture."""
    same = np.ones(1000, bool)
    same[np.random.default_rng(changed).choice(1000, changed, replace=False)] = False
    held = 0
    for seed in range(300):
        audit = Audit(rate=0.1, seed=seed)
        rows = [row(n, bool(same[n]) if audit.chooses(n) else None) for n in range(1000)]
        found = audit_summary(rows, 0.1, 0.0, of_rows=1000)
        low, high = found["agreement"]["interval"]
        held += low <= same.mean() <= high
    assert held / 300 >= 0.92


def test_what_excludes_an_audit() -> None:
    with pytest.raises(UserError, match="--min-agreement needs --audit"):
        made_of(min_agreement=0.9)
    with pytest.raises(UserError, match="--audit and --compare exclude each other"):
        made_of(audit=0.1, compare=("1", "1/9"))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_audited_answers_are_the_unpruned_models(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    flags = ["--output", str(out), "--limit", str(ROWS), "--retention", FEW_TOKENS]
    flags += ["--audit", str(RATE), "--min-agreement", "1", "--log-interval", "60"]
    code = main(caption.JOB, flags)
    rows = sorted(pq.read_table(out / "rows").to_pylist(), key=lambda one: one["row"])
    audit = Audit(rate=RATE, seed=0)
    audited = [one for one in rows if one["audit_match"] is not None]
    assert [one["row"] for one in audited] == [n for n in range(ROWS) if audit.chooses(n)]
    assert {one["row"] for one in rows if one["audit_repeat_match"] is not None} == {
        n for n in range(ROWS) if audit.chooses(n) and audit.repeats(n)
    }
    assert all(one["audit_repeat_match"] is not False for one in rows)
    truth = unpruned()
    assert {one["row"]: one["audit_response"] for one in audited} == {
        one["row"]: truth[one["row"]] for one in audited
    }
    assert all(one["audit_match"] == (one["response"] == truth[one["row"]]) for one in audited)
    same = sum(one["audit_match"] for one in audited)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["audit"]["agreement"]["value"] == same / len(audited)
    assert (summary["rows"], summary["audited"]) == (ROWS, len(audited))
    pictures = {one["picture"] for one in rows}
    assert summary["images"] == ROWS > summary["images_encoded"] == len(pictures)
    assert 0.02 < summary["retention"] < 0.04 and summary["phases"]["audit_s"] > 0
    assert code == (0 if same == len(audited) else 3)
    assert f"audit: {len(audited)} rows" in capsys.readouterr().out


def unpruned() -> dict[int, str | None]:
    """The model's own answers to the first rows of the bundled shard."""
    import io

    from PIL import Image

    from trio.engine.request import Request

    engine = Engine.from_pretrained("demo", device="cpu")
    table = pq.read_table(SHARD).slice(0, ROWS).to_pylist()
    requests = [
        Request(prompt=one["prompt"], images=(Image.open(io.BytesIO(one["image"]["bytes"])),), id=n)
        for n, one in enumerate(table)
    ]
    return {one.id: one.response for one in engine.generate(requests)}
