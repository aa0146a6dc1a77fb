"""Shards have the bytes that tarfile alone gave them, by webdataset's writer; tars that mean harm are refused."""

import hashlib
import io
import tarfile
from pathlib import Path

import pytest

from instructblip.data.records import Record
from instructblip.data.shards import ShardWriter, index_path
from instructblip.data.tars import tar_members
from instructblip.errors import UserError
from tests.kit.tars import END, Pipe, as_tarfile_writes, header


def test_a_shard_has_the_bytes_that_it_always_had(tmp_path: Path) -> None:
    """A picture, a film whose tenth frame comes after its ninth, a name longer than a header holds, an empty member."""
    with ShardWriter.open(path := tmp_path / "shard-000000.tar") as writer:
        asked = [Record("1-0", "caption", answers=("größer",))]
        writer.add("picture", {"jpg": b"\xff\xd8\xff" + bytes(range(200))}, "1", asked)
        film = {f"{number}.jpg": bytes([number]) * (500 + number) for number in range(12)}
        writer.add("film", film, "2", [Record("2-0", "question", "what?", answers=("a",))])
        writer.add("k" * 150, {"png": b"\x89PNG" + b"x" * 12_000}, "3", [])
        writer.add("zero", {"png": b""}, "4", [Record("4-0", "a"), Record("4-1", "b")])
    # Written by commit 27b96e1, by tarfile.
    assert hashlib.sha256(path.read_bytes()).hexdigest().startswith("7cf56fba7e13b0317982c2a57b037652")
    assert hashlib.sha256(index_path(path).read_bytes()).hexdigest().startswith("511cce2613c03edda158f500ea3a1595")
    assert path.read_bytes() == as_tarfile_writes(path)


# --- tars that mean harm ---------------------------------------------------------------------------------------------


def test_a_member_is_read_where_it_stands_and_what_is_not_wanted_is_passed_over() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in (("a.jpg", bytes(3 << 20)), ("a.txt", b"x" * 512), ("b" * 200 + ".txt", b"long")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    pipe = Pipe(buffer.getvalue())
    found = [(member.name, member.size, member.read()) for member in tar_members(pipe, "t") if member.size < 1000]
    assert found == [("a.txt", 512, b"x" * 512), ("b" * 200 + ".txt", 4, b"long")]
    assert pipe.most <= 1 << 20
    offsets = [(member.offset, member.size) for member in tar_members(io.BytesIO(buffer.getvalue()), "t")]
    assert [buffer.getvalue()[start : start + size][:2] for start, size in offsets] == [b"\0\0", b"xx", b"lo"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (header("x", 8 << 30, tarfile.XHDTYPE), "a header of 8,589,934,592 bytes is not to be trusted"),
        (header("x", 8 << 30, tarfile.GNUTYPE_LONGNAME), "a header of 8,589,934,592 bytes is not to be trusted"),
        (header("a.jpg", -(1 << 20)) + END, "begins at byte"),
        (header("a.jpg", 8 << 30) + END, "unexpected end of data"),
        (b"".join(header("x", 0, tarfile.XHDTYPE) for _ in range(2000)) + END, "nested too deep"),
        (b"<html>" * 200, "is no whole tar"),
        (header("a.txt", 0) + bytes(range(256)) * 2 + END, "cut short or damaged at byte 512"),
        (header("a.txt", 0), "cut short or damaged at byte 512"),
    ],
)
def test_no_header_fills_the_memory_or_goes_round_for_ever(content: bytes, words: str) -> None:
    pipe = Pipe(content)
    with pytest.raises(UserError, match=words):
        list(tar_members(pipe, "t"))
    assert pipe.most <= 1 << 20


def test_sparse_members_links_and_names_that_lead_out_are_refused_before_they_are_read() -> None:
    heads = [header("a.jpg", 0, kind) for kind in (tarfile.GNUTYPE_SPARSE, tarfile.SYMTYPE, tarfile.LNKTYPE)]
    heads += [header(name, 0) for name in ("../a.jpg", "/a.jpg", "b/../../a.jpg")]
    found = [member.refusal for member in tar_members(Pipe(b"".join(heads) + END), "t")]
    assert found == ["member is no regular file"] * 3 + ["member name leads out of its folder"] * 3
