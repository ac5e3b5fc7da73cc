"""Answers and scores for data sets of questions about images.

Reads Parquet shards, asks a vision-language model that drops the image tokens its prompt does not
need, and writes an answer with its score for every question, or how likely each of given answers
is; the data set's figures go to metrics.json. Without arguments: the bundled shard and model.
"vqa.py average OUT OUT ..." prints finished comparisons side by side, relative to the unpruned
model, and their average.

exit codes: 0 all rows written; 1 the job failed; 2 arguments, configuration or input schema are
wrong; 3 finished with more rows in error than --max-error-rate

example:
  python jobs/vqa.py --preset pope --input pope/ --output answers \\
    --model llava-hf/llava-1.5-7b-hf --compare 1,1/3,1/9
"""

import _bootstrap  # noqa: F401  # isort: skip

from trio.job.command import Job, main

JOB = Job(name="vqa", description=__doc__, asks=True)

if __name__ == "__main__":
    raise SystemExit(main(JOB))
