"""READMEs: Python runs as it is printed, offline; commands have the flags they use; links lead.

What needs a hub, a bucket or a cluster is a shell block, of which the flags are looked at; JSON is
the bundled model's pruning config. There is no other kind, which nobody would look at. The dated
files of `benchmark/results` say what was run then: of them only links are looked at.
"""

import json
import re
import shlex
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.job.commits import commit
from trio.benchmark import commands as benchmark
from trio.bundled import MODEL, PROMPTS, SHARD, write_images
from trio.engine.engine import Engine
from trio.engine.request import Request
from trio.job import cli
from trio.job.command import AVERAGE
from trio.job.input.units import Unit
from trio.job.output.dataset_card import CARD, dataset_card
from trio.job.output.summary import summarise
from trio.job.output.totals import Totals
from trio.job.settings import Settings
from trio.pruning import method_registry
from trio.pruning.method_registry import method_names
from trio.pruning.options import ENCODERS, Pruning
from trio.pruning.pruning_config import FILE
from trio.report import report_command

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (".", ".packaging", "jobs", "trio", "trio/*", "tests", "tests/*")
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for folder in FOLDERS
    for path in sorted(ROOT.glob(f"{folder}/*.md"))
}
RESULTS = sorted(ROOT.glob("trio/benchmark/results/*.md"))
BLOCKS = {
    page: re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    for page, text in PAGES.items()
}
CAPTIONS = [
    f"{row['image']['path']} {row['answers'][0]} 0.11"
    for row in pq.read_table(SHARD).slice(0, 6).to_pylist()
    if row["kind"] == "caption"
]
SAYS = {
    "README.md": [CAPTIONS, ["a red 5 and a green 7\n"]],
    "trio/pruning/README.md": [["[118, 69, 28] "]],
    "trio/job/OUTPUT.md": [["4 x\n", "stop    4\n"]],
    "trio/vqa/README.md": [["0.6", "1.0"]],
    "trio/engine/README.md": [["[1.0, 0.0]"], ["[118, 69, 28]"]],
}
"""What each Python sample of a page must print, in their order."""


def samples(page: str) -> list[str]:
    return [text for kind, text in BLOCKS[page] if kind == "python"]


def test_every_python_sample_is_run() -> None:
    assert {page: len(samples(page)) for page in PAGES if samples(page)} == {
        page: len(says) for page, says in SAYS.items()
    }


@pytest.mark.parametrize(
    ("page", "number"), [(page, number) for page in SAYS for number in range(len(SAYS[page]))]
)
def test_python_samples_run_as_printed(
    page: str,
    number: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if "OUT" in samples(page)[number]:
        write_output(tmp_path / "OUT")
        monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(method_registry, "_registered", {})
    exec(compile(samples(page)[number], page, "exec"), {"__name__": "__main__"})
    printed = capfd.readouterr()
    missing = [line for line in SAYS[page][number] if line not in printed.out]
    assert not missing, printed.out
    assert "was not taught" not in printed.err


def write_output(out: Path) -> None:
    """Rows, statistics and card of a run, with some of its other files."""
    for unit in (Unit(0, 0, 2), Unit(0, 2, 4)):
        commit(out, unit)
    summary = summarise(
        Totals(rows=4), name="", run_id="r", wall_s=1, done_before=Totals(), work_s=1, resources=""
    )
    for name in ("run.yaml", "manifest.parquet", "_SUCCESS"):
        (out / name).touch()
    (out / CARD).write_text(dataset_card(Settings(), summary))


def commands(page: str) -> list[list[str]]:
    """Arguments of each `python jobs/...`, name first, in shell blocks and within the text."""
    shell = "\n".join(text for kind, text in BLOCKS[page] if kind == "bash").replace("\\\n", " ")
    text = re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    lines = [line for line in shell.splitlines() if "jobs/" in line]
    lines += re.findall(r"`(python\s+jobs/[^`]*)`", text)
    return [
        [found[1], *shlex.split(found[2])]
        for line in lines
        if (found := re.search(r"python\s+jobs/(\w+)\.py(.*)", " ".join(line.split())))
    ]


@pytest.mark.parametrize(
    "command", [command for page in PAGES for command in commands(page)], ids=" ".join
)
def test_commands_have_flags_that_exist(command: list[str]) -> None:
    name, *flags = command
    read: Callable[[], object]
    if flags[:1] == [AVERAGE]:
        assert name == "vqa" and len(flags) > 1
        return
    if name == "report":
        read = partial(report_command.read, flags, "")
    elif name == "benchmark":
        read = partial(benchmark.read, flags, "")
    else:
        # Of a schedule's file there is only the name.
        flags = ["1:0.5" if word == "schedule.yaml" else word for word in flags]
        read = partial(cli.read_call, flags, prog="", description="")
    if "--help" in flags:
        with pytest.raises(SystemExit, match="0"):
            read()
    else:
        read()


def test_modules_that_are_run_exist() -> None:
    named = {
        name
        for text in PAGES.values()
        for name in re.findall(r"\s-m\s((?:trio|tests)[.\w]+)", text)
    }
    assert "trio.demo.kept_picture" in named
    assert not [name for name in named if find_spec(name) is None]


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_of_a_kind_that_is_looked_at(page: str) -> None:
    assert {kind for kind, _ in BLOCKS[page]} <= {"python", "bash", "json", ""}
    plain = [text for kind, text in BLOCKS[page] if not kind]
    assert not [text for text in plain if re.search(r"python|import ", text)]
    assert len(re.findall(r"python\s+jobs/", PAGES[page])) == len(commands(page))


@pytest.mark.parametrize(
    "path",
    [*map(ROOT.joinpath, PAGES), *RESULTS],
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_links_lead_to_files_and_headings(path: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", path.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    links = [*re.findall(r"\]\(([^)\s]+)\)", text), *re.findall(r'src="([^"]+)"', text)]
    for link in (link for link in links if not link.startswith("http")):
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text("utf-8")), link


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_first_page_is_short_and_its_tables_are_true() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 220
    rows = {
        flag: set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
        for flag, table in re.findall(
            r"^\| `--(method|encoder)` \|(.*?)^$", PAGES["README.md"], re.MULTILINE | re.DOTALL
        )
    }
    # A new method is one file: its row may come later, but no row is of a method that is gone.
    assert {"trio", "eadp_llm", "cdpruner"} <= rows["method"] <= set(method_names())
    assert rows["encoder"] == set(ENCODERS)


def test_the_pruning_config_shown_is_the_bundled_models() -> None:
    shown = [json.loads(text) for page in PAGES for kind, text in BLOCKS[page] if kind == "json"]
    assert shown == [json.loads((MODEL / FILE).read_text())]


def test_the_prompts_of_the_bundled_model_are_listed_with_its_answers(tmp_path: Path) -> None:
    page = PAGES["trio/demo/README.md"]
    listed = dict(re.findall(r"^\| `([^`]*)` \| `([^`]*)` \|$", page, re.MULTILINE))
    assert listed.keys() >= {prompt.format(color="red", digit=7) for prompt in PROMPTS}
    image = Image.open(write_images(tmp_path, 1)[0])
    engine = Engine.from_pretrained("demo", device="cpu", pruning=Pruning(retention=1 / 9))
    requests = [Request(prompt=prompt, images=(image,), id=prompt) for prompt in listed]
    assert {result.id: result.response for result in engine.generate(requests)} == listed
