"""Some rows of a job's input as requests, read as the job reads them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trio.engine.request import Request, Sampling
from trio.errors import UserError
from trio.job.images.image_files import load_images
from trio.job.images.policy import RowError
from trio.job.images.time_limit import TimeLimit
from trio.job.input.columns import parse_mapping, resolve
from trio.job.input.manifest import Manifest, inspect
from trio.job.input.reader import RunReader, ShardUnreadable
from trio.job.input.units import Unit
from trio.job.output.output_rows import RowSettings, requests_of, sources
from trio.job.settings import Settings
from trio.job.storage import parent

PLACES = 8
"""Row groups that rows come from, where there are so many."""


def sample(
    config: Settings, paths: Sequence[str], rows: int
) -> tuple[list[Request], list[RowError]]:
    """Rows of the input, drawn with the settings' seed and in an order drawn with it.

    Args:
        config: its columns, prompt, image policy and seed count.
        paths: where its inputs lie.
        rows: how many; fewer where the input has fewer.

    Returns:
        Requests with ids of their own, and what is wrong with rows that cannot be asked.

    Raises:
        UserError: the input is none, or cannot be read.
    """
    manifest, schemas = inspect(paths)
    mapping = parse_mapping(config.input.columns or "")
    mapping.pop("answers", None)
    columns = resolve(
        schemas,
        [shard.path for shard in manifest.shards],
        mapping,
        prompt_given=bool(config.input.prompt),
    )
    settings = RowSettings(
        prompts=config.input.prompt,
        sampling=Sampling(max_new_tokens=config.sampling.max_new_tokens),
        policy=config.image_policy(),
        seed=config.seed,
    )
    shards = {shard.number: shard for shard in manifest.shards}
    reader = RunReader(shards, columns.roles, lambda *_: None)
    requests: list[Request] = []
    errors: list[RowError] = []
    for unit in drawn(manifest, rows, config.seed):
        path = shards[unit.shard].path
        table = reader.read(unit)
        if isinstance(table, ShardUnreadable):
            raise UserError(str(table))
        base = parent(path)
        with TimeLimit(settings.policy.row_timeout) as limit:
            for source in sources(table, unit, path):
                try:
                    with limit.row():
                        images = load_images(source.cell("image"), base, settings.policy)
                    for one in requests_of(source, images, settings):
                        if isinstance(one, RowError):
                            errors.append(one)
                        else:
                            requests.append(one)
                except RowError as error:
                    errors.append(error)
    reader.close()
    order = np.random.default_rng(config.seed).permutation(len(requests))
    return [requests[number] for number in order], errors


def drawn(manifest: Manifest, rows: int, seed: int) -> list[Unit]:
    """The first rows of row groups drawn at random: of large ones little need be read."""
    groups = []
    for shard in manifest.shards:
        start = 0
        for size in shard.row_groups:
            groups.append(Unit(shard.number, start, start + size))
            start += size
    share = -(-rows // PLACES)
    left = min(rows, manifest.rows)
    taken = dict.fromkeys(np.random.default_rng(seed).permutation(len(groups)).tolist(), 0)
    while left:
        for number, before in taken.items():
            more = min(share, groups[number].stop - groups[number].start - before, left)
            taken[number] += more
            left -= more
    chosen = ((groups[number], count) for number, count in taken.items() if count)
    return sorted(Unit(group.shard, group.start, group.start + count) for group, count in chosen)
