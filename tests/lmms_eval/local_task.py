"""Tasks of lmms-eval in a directory: 100 rows of scenes, and those of them with yes or no."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

from trio.demo.shard import write_shard

OPEN, CHOICE = "trio_scenes", "trio_scenes_yes_no"
GENERATION = (
    "max_new_tokens: 24\n  temperature: 0\n  top_p: 1.0\n  num_beams: 1\n  do_sample: false"
)

_COMMON = """\
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
doc_to_visual: !function scenes.visuals
doc_to_text: "{{{{prompt}}}}"
metadata:
  - version: 1.0
"""
_OPEN = """\
task: trio_scenes
output_type: generate_until
doc_to_target: "{{{{answers[0]}}}}"
generation_kwargs:
  {generation}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
    ignore_punctuation: true
"""
_CHOICE = """\
task: trio_scenes_yes_no
output_type: multiple_choice
doc_to_choice: ["yes", "no"]
doc_to_target: "{{{{answers[0]}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
_VISUALS = """\
import io

from PIL import Image


def visuals(document):
    return [Image.open(io.BytesIO(document["image"]["bytes"]))]
"""


def write_tasks(folder: Path, generation: str = GENERATION) -> Path:
    """Both tasks; returns the Parquet file of the rows."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, choice = folder / "rows.parquet", folder / "choice.parquet"
    write_shard(rows, scenes=50, seed=7)
    table = pq.read_table(rows)
    asked = [kind == "presence" for kind in table["kind"].to_pylist()]
    pq.write_table(table.filter(asked), choice)
    (folder / "scenes.py").write_text(_VISUALS)
    for name, own, data in ((OPEN, _OPEN, rows), (CHOICE, _CHOICE, choice)):
        text = (_COMMON + own).format(data=data, generation=generation)
        (folder / f"{name}.yaml").write_text(text)
    return rows
