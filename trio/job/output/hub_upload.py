"""A finished output as a data set on the Hugging Face Hub: one commit, so nothing half is seen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from pyarrow import fs as pafs

from trio.errors import JobFailed, UserError, kind_and_line
from trio.job.comparing.changed_answers import CHANGED
from trio.job.comparing.metrics_file import METRICS, TABLE
from trio.job.output.dataset_card import CARD, HERE
from trio.job.output.output_directory import CONFIG, SUMMARY
from trio.job.output.sink import ROWS, STATS
from trio.job.storage import Location, exists, list_files, read_bytes

SINGLE = (SUMMARY, CONFIG, METRICS, TABLE, CHANGED)
"""Files that go beside the card, as far as the run has them."""
KIND = "dataset"


def check_access(repository: str) -> None:
    """Whether the hub knows who uploads.

    Raises:
        UserError: there is no token, or the hub does not take it.
    """
    flag = f"--push-to-hub {repository}"
    if get_token() is None:
        raise UserError(f"{flag}: no token; set HF_TOKEN to one that may write there")
    try:
        HfApi().whoami()
    except Exception as error:  # no list of what the client raises, which has changed before
        raise UserError(
            f"{flag}: the hub does not take the token ({kind_and_line(error)}); check HF_TOKEN and"
            " the network, or leave the flag out"
        ) from error


def push(output: Location, repository: str, *, private: bool) -> str:
    """Upload a finished run; what is there already is not sent again, rows of another run go.

    Args:
        output: the run's directory.
        repository: ORG/NAME; made if need be.
        private: whether it is made so; else as is usual for ORG.

    Returns:
        The repository's address.

    Raises:
        JobFailed: the hub or the storage fails; the same command tries it again.
    """
    try:
        api = HfApi()
        url = api.create_repo(repository, private=private or None, repo_type=KIND, exist_ok=True)
        with TemporaryDirectory() as room:
            adds = [_card(output, repository)]
            adds += [_sent(api, repository, file, name, room) for name, file in _files(output)]
            names = {add.path_in_repo for add in adds}
            there = api.list_repo_files(repository, repo_type=KIND)
            gone = [CommitOperationDelete(name) for name in there if _written_by_a_run(name)]
            api.create_commit(
                repository,
                [*(one for one in gone if one.path_in_repo not in names), *adds],
                commit_message="Rows of trio-vlm",
                repo_type=KIND,
            )
    except Exception as error:  # no list of what the client raises, which has changed before
        raise JobFailed(
            f"all rows are written, but not uploaded to {repository}: {kind_and_line(error)}; the"
            " same command with the same --output tries it again"
        ) from error
    return str(url)


def _card(output: Location, repository: str) -> CommitOperationAdd:
    text = read_bytes(output.join(CARD)).decode().replace(HERE, HERE.replace(".", repository, 1))
    return CommitOperationAdd(CARD, text.encode())


def _files(output: Location) -> Iterator[tuple[str, Location]]:
    """All others, by their names there."""
    for name in SINGLE:
        if exists(output.join(name)):
            yield name, output.join(name)
    for folder in (ROWS, STATS):
        for info in list_files(output.join(folder)):
            yield f"{folder}/{info.base_name}", output.at(info.path)


def _written_by_a_run(name: str) -> bool:
    return name in SINGLE or name.startswith((f"{ROWS}/", f"{STATS}/"))


def _sent(api: HfApi, repository: str, file: Location, name: str, room: str) -> CommitOperationAdd:
    """A file to be committed. One of an object store is sent now, if it is large, so that only one
    at a time takes room here."""
    if file.local:
        return CommitOperationAdd(name, file.path)
    path = Path(room, name.replace("/", "-"))
    here = pafs.LocalFileSystem()
    pafs.copy_files(
        file.path, str(path), source_filesystem=file.filesystem, destination_filesystem=here
    )
    made = CommitOperationAdd(name, str(path))
    api.preupload_lfs_files(repository, [made], repo_type=KIND)
    if isinstance(made.path_or_fileobj, bytes):  # it has been sent
        path.unlink()
    return made
