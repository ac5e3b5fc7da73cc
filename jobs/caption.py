"""Captions for Parquet shards of images and prompts: python jobs/caption.py --help."""

import _bootstrap

ROOT = _bootstrap.ROOT

from trio.pipeline.job import Job, main  # noqa: E402

JOB = Job(
    name="caption",
    description=(
        "Reads Parquet shards of images and prompts and writes one answer per row, with statistics,"
        " using a vision-language model that drops the image tokens its prompt does not need."
        " Without arguments: the bundled shard and the bundled model, beside the unpruned model."
    ),
    epilog=(
        "exit codes: 0 all rows written; 1 the job failed; 2 arguments, configuration or input"
        " schema are wrong; 3 finished with more rows in error than --max-error-rate"
    ),
    package=str(ROOT / "trio"),
)

if __name__ == "__main__":
    raise SystemExit(main(JOB))
