"""Captions for Parquet shards of images and prompts.

Reads shards and writes one answer per row, with statistics, using a vision-language model that
drops the image tokens its prompt does not need. Without arguments: the bundled shard and the
bundled model, beside the unpruned model.

exit codes: 0 all rows written; 1 the job failed; 2 arguments, configuration or input schema are
wrong; 3 finished with more rows in error than --max-error-rate

example:
  python jobs/caption.py --input 'photos/*.parquet' --output captions \\
    --model llava-hf/llava-1.5-7b-hf --prompt 'Describe the image.' --retention 1/9
"""

import _bootstrap  # noqa: F401  # isort: skip

from trio.job.command import Job, main

JOB = Job(name="caption", description=__doc__)

if __name__ == "__main__":
    raise SystemExit(main(JOB))
