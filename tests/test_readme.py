"""README's samples: Python runs as it is printed, offline; commands have the flags they use.

What needs a hub, a bucket or a cluster is a shell block, of which the flags are looked at; JSON is
the bundled model's pruning config. There is no other kind, which nobody would look at.
"""

import json
import re
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from trio.benchmark import commands as benchmark
from trio.bundled import MODEL, PROMPTS, SHARD, write_images
from trio.engine.engine import Engine
from trio.engine.request import Request
from trio.job import cli
from trio.pruning.options import Pruning
from trio.pruning.pruning_config import FILE

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
SAMPLES = [text for kind, text in BLOCKS if kind == "python"]
CAPTIONS = [
    f"{row['image']['path']} {row['answers'][0]} 0.11"
    for row in pq.read_table(SHARD).slice(0, 6).to_pylist()
    if row["kind"] == "caption"
]
SAYS = [["5 images in photos.parquet"], ["a red 5 and a green 7\n"], CAPTIONS]
"""What each Python sample must print, in their order."""
TYPES = ["jpg", "JPEG", "png", "webp", "gif"]


@pytest.mark.parametrize(("code", "says"), list(zip(SAMPLES, SAYS, strict=True)))
def test_python_samples_run_as_printed(
    code: str,
    says: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "photos" / "trip").mkdir(parents=True)
    for place, suffix in enumerate(TYPES):
        folder = "photos/trip" if place % 2 else "photos"
        Image.new("RGB", (8, 8)).save(tmp_path / folder / f"{place}.{suffix}")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    printed = capfd.readouterr()
    missing = [line for line in says if line not in printed.out]
    assert not missing, printed.out
    assert "was not taught" not in printed.err


def commands() -> list[list[str]]:
    """Arguments of each `python jobs/...`, name first, in shell blocks and within the text."""
    shell = "\n".join(text for kind, text in BLOCKS if kind == "bash").replace("\\\n", " ")
    text = re.sub(r"^```.*?^```$", "", README, flags=re.DOTALL | re.MULTILINE)
    lines = [line for line in shell.splitlines() if "jobs/" in line]
    lines += re.findall(r"`(python\s+jobs/[^`]*)`", text)
    return [
        [found[1], *shlex.split(found[2])]
        for line in lines
        if (found := re.search(r"python\s+jobs/(\w+)\.py(.*)", " ".join(line.split())))
    ]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_commands_have_flags_that_exist(command: list[str]) -> None:
    name, *flags = command
    read: Callable[[], object]
    if name == "benchmark":
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


def test_every_block_is_of_a_kind_that_is_looked_at() -> None:
    assert {kind for kind, _ in BLOCKS} == {"python", "bash", "json", ""}
    assert not [text for kind, text in BLOCKS if not kind and re.search(r"python|import ", text)]
    assert {name for name, *_ in commands()} == {"caption", "benchmark"}
    assert README.count("python jobs/") + README.count("python\njobs/") == len(commands())


def test_the_pruning_config_shown_is_the_bundled_models() -> None:
    shown = [json.loads(text) for kind, text in BLOCKS if kind == "json"]
    assert shown == [json.loads((MODEL / FILE).read_text())]


def test_the_prompts_of_the_bundled_model_are_listed_with_its_answers(tmp_path: Path) -> None:
    listed = dict(re.findall(r"^\| `([^`]*)` \| `([^`]*)` \|$", README, re.MULTILINE))
    assert listed.keys() >= {prompt.format(color="red", digit=7) for prompt in PROMPTS}
    image = Image.open(write_images(tmp_path, 1)[0])
    engine = Engine.from_pretrained("demo", device="cpu", pruning=Pruning(retention=1 / 9))
    requests = [Request(prompt=prompt, images=(image,), id=prompt) for prompt in listed]
    assert {result.id: result.response for result in engine.generate(requests)} == listed
