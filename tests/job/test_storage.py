"""Paths, patterns, and writes that are whole or not there."""

import dataclasses
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs as pafs

from tests.job.fakes import ODD_NAMES
from trio.errors import UserError
from trio.job.output.sink import serialise
from trio.job.storage import (
    Location,
    bare,
    check_no_secret,
    exists,
    list_files,
    locate,
    matcher,
    parent,
    read_bytes,
    split_options,
    sweep,
    write_atomic,
)


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("/d/*.parquet", ["/d/a.parquet"], ["/d/e/a.parquet", "/d/a.parquet.tmp"]),
        ("/d/**/*.parquet", ["/d/a.parquet", "/d/e/f/a.parquet"], ["/e/a.parquet"]),
        ("/d/a-?.p", ["/d/a-1.p"], ["/d/a-12.p", "/d/a-/.p"]),
        ("/d/a[0-3].p", ["/d/a2.p"], ["/d/a4.p"]),
        ("/d/a[!0-3].p", ["/d/a4.p"], ["/d/a2.p"]),
        ("/d/a.p", ["/d/a.p"], ["/d/aXp"]),
        ("/d/[x", ["/d/[x"], ["/d/x"]),
        ("d/[[]x", ["d/[x"], ["d/x"]),
        ("**", ["a", "b=1/_c=2/a", "é/a b"], [".a", "b/.c/a", "_b/a", "b/_c", "a/.ipynb_c/a.p"]),
        ("**/*.p", ["a.p", "_c=2/a.p"], ["b/._a.p", "_temporary/0/a.p", ".c/a.p", "_a.p"]),
        ("*/[!x]*", ["a/b"], ["a/.b", "a/_b", "_a/b"]),
        ("?a*", ["ba"], [".a", "_a"]),
        ("_t*/*.p", ["_tmp/a.p"], ["_tmp/_a.p"]),
        ("**/.x/*", [".x/a", "b/.x/a"], [".y/.x/a"]),
    ],
)
def test_patterns(pattern: str, yes: list[str], no: list[str]) -> None:
    fits = matcher(pattern)
    assert all(map(fits, yes)) and not any(map(fits, no))


def test_listing_leaves_hidden_files_out_below_a_directory(tmp_path: Path) -> None:
    for name in ("b.x", "a.x", "_hidden.x", ".h.x", "sub/c.x", "_sub/d.x"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("1")
    found = listed(tmp_path)
    assert (
        found == listed(tmp_path, "**") == listed(tmp_path, "**/*.x") == ["a.x", "b.x", "sub/c.x"]
    )
    assert listed(tmp_path, "_h*.x") == listed(tmp_path, "_hidden.x") == ["_hidden.x"]
    assert listed(tmp_path, "_sub") == ["_sub/d.x"]


def listed(root: Path, pattern: str = "") -> list[str]:
    infos = list_files(locate(os.path.join(root, pattern)))
    return [os.path.relpath(info.path, root) for info in infos]


def test_directories_with_brackets_in_their_names(tmp_path: Path) -> None:
    for name in ("[2024]/a.x", "2/a.x", "[2024]/q[1]?/*/b.x"):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text("1")
    assert listed(tmp_path, "[2024]/*.x") == ["[2024]/a.x"]
    assert listed(tmp_path, "[2024]/q[1]?/*/*.x") == ["[2024]/q[1]?/*/b.x"]
    assert listed(tmp_path, "[0-9]/*.x") == ["2/a.x"]


def test_relative_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate("a/b").uri == str(tmp_path / "a" / "b")
    assert locate(f"file://{tmp_path}/c").uri == str(tmp_path / "c")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("~/c").uri == str(tmp_path / "c") and locate("~no-user/c").path.startswith("/")


@pytest.mark.parametrize("name", ODD_NAMES)
def test_names_are_taken_letter_for_letter(tmp_path: Path, name: str) -> None:
    """A local path as it is, a file:// URI decoded; others as the store lists them."""
    assert locate(str(tmp_path / name)).path == str(tmp_path / name)
    local = locate((tmp_path / name).as_uri())
    assert local.path == str(tmp_path / name) and locate(local.uri).path == local.path
    for options in ("", "?region=eu-west-1&scheme=http"):
        location = locate("s3://bucket?region=us-east-1").at(f"bucket/d/{name}")
        location = dataclasses.replace(location, query=options)
        assert split_options(location.uri) == (f"s3://bucket/d/{name}", options)
        assert bare(location.uri) == f"s3://bucket/d/{name}"
    again = locate(f"s3://bucket/d/{name}?region=us-east-1")
    assert again.path == f"bucket/d/{name}" and parent(again.uri).path == "bucket/d"
    assert locate(f"hf://datasets/a/b/{name}").path == f"datasets/a/b/{name}"
    remote = locate(f"memory://{tmp_path.name}/{name.replace('::', '')}")
    write_atomic(remote, b"data")
    assert read_bytes(locate(remote.uri)) == b"data"
    assert [i.path for i in list_files(locate(f"memory://{tmp_path.name}"))] == [remote.path]


@pytest.mark.parametrize(
    ("uri", "path", "back"),
    [
        ("gs://bucket/x y?scheme=http", "bucket/x y", "gs://bucket/x y?scheme=http"),
        ("s3://bucket?region=eu-west-1", "bucket", "s3://bucket?region=eu-west-1"),
    ],
)
def test_paths_of_other_stores(uri: str, path: str, back: str) -> None:
    assert (locate(uri).path, locate(uri).uri) == (path, back)
    assert locate(back).path == path


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("file://server/share/x", "names the machine 'server'"),
        (os.fsdecode(b"/d/\xff"), "not UTF-8"),
        ("s3://bucket/a?regoin=x", "add '\\?&' if it is a name"),
    ],
)
def test_what_cannot_be_opened_says_why(uri: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        locate(uri)


def test_a_write_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = locate(str(tmp_path / "new" / "x.parquet"))
    write_atomic(target, b"one")
    write_atomic(target, b"two")
    assert read_bytes(target) == b"two"
    assert os.listdir(tmp_path / "new") == ["x.parquet"]


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = locate(str(tmp_path / "x.parquet"))
    write_atomic(target, b"old")

    def full(fd: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_atomic(target, b"new")
    assert read_bytes(target) == b"old"
    assert os.listdir(tmp_path) == ["x.parquet"]


def test_what_a_killed_write_leaves_is_hidden_from_readers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_atomic(locate(str(tmp_path / "0.parquet")), serialise(pa.table({"x": [1]})))
    monkeypatch.setattr(Path, "replace", lambda self, target: self)
    monkeypatch.setattr(Path, "unlink", lambda self, missing_ok: None)
    write_atomic(locate(str(tmp_path / "1.parquet")), b"torn")
    assert len(os.listdir(tmp_path)) == 2
    assert pq.read_table(tmp_path).column("x").to_pylist() == [1]


def test_leftovers_of_killed_writes_are_swept_and_nothing_else(tmp_path: Path) -> None:
    left, others = ".0.parquet.0123abcd.tmp", ["0.parquet", ".hidden", "x.0123abcd.tmp", ".x.tmp"]
    for name in (left, *others):
        (tmp_path / name).write_text("")
    sweep(locate(str(tmp_path)))
    assert sorted(os.listdir(tmp_path)) == sorted(others)
    sweep(locate(str(tmp_path / "missing")))


def test_the_name_is_flushed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: flushed.append(os.readlink(f"/proc/self/fd/{fd}")))
    write_atomic(locate(str(tmp_path / "x")), b"1")
    assert flushed[0].endswith(".tmp") and flushed[1] == str(tmp_path)


def test_options_of_a_uri_stay_with_what_is_derived_from_it() -> None:
    options = "?region=eu-west-1&endpoint_override=localhost%3A9000"
    location = locate(f"s3://bucket/out{options}")
    assert location.path == "bucket/out"
    assert location.join("rows", "0.parquet").uri == f"s3://bucket/out/rows/0.parquet{options}"
    assert locate(location.uri).uri == location.uri


def test_object_stores_get_the_final_name() -> None:
    store = pafs._MockFileSystem()
    store.create_dir("bucket")
    target = Location(filesystem=store, path="bucket/x", prefix="mock://")
    write_atomic(target, b"data")
    assert exists(target) and read_bytes(target) == b"data"
    assert [i.base_name for i in list_files(target.at("bucket"))] == ["x"]


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIA:verysecret@bucket/x",
        "s3://bucket/x?secret_key=verysecret",
        "https://host/x?X-Amz-Signature=verysecret",
        "gs://verysecret@bucket/x",
        "s3://bucket/a#b?secret_key=verysecret",
        "s3://bucket/a?b?secret_key=verysecret",
    ],
)
def test_credentials_in_a_uri_are_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(UserError) as caught:
        check_no_secret(uri)
    assert "verysecret" not in str(caught.value) and "environment" in str(caught.value)


def test_uris_without_credentials_pass() -> None:
    for uri in ("s3://bucket/x?region=eu-west-1", "hf://datasets/a/b", "/a/b?token=1"):
        check_no_secret(uri)


def test_an_unknown_scheme_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match="nosuch"):
        locate("nosuch://bucket/x")
