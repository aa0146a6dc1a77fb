"""Archives from elsewhere: what is sound is unpacked, what is hostile or damaged writes nothing outside and says so."""

import bz2
import gzip
import io
import lzma
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from instructblip.errors import UserError
from instructblip.fetch import archives
from instructblip.fetch.archives import ArchiveError, unpack

SOUND = {"a/one.txt": b"one" * 100, "a/b/two.txt": b"two", "three.json": b"{}"}


def _zip(path: Path, files: dict[str | zipfile.ZipInfo, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def _tar(path: Path, files: dict[str, bytes], **fields: dict[str, object]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        folder = tarfile.TarInfo("a")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for field, value in fields.get(name, {}).items():
                setattr(info, field, value)
            archive.addfile(info, io.BytesIO(content))
    return path


def _files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


@pytest.mark.parametrize("make", [_zip, _tar])
def test_a_sound_archive_is_unpacked(tmp_path: Path, make: Callable[[Path, dict[str, bytes]], Path]) -> None:
    archive, done = make(tmp_path / "sound", SOUND), []
    assert unpack(archive, tmp_path / "all", advance=done.append) == 3
    assert (_files(tmp_path / "all"), done) == (SOUND, [300, 3, 2])
    assert unpack(archive, tmp_path / "some", members=["*.txt"]) == 2
    assert sorted(_files(tmp_path / "some")) == ["a/b/two.txt", "a/one.txt"]
    assert unpack(archive, tmp_path / "flat", flat=True) == 3
    assert sorted(_files(tmp_path / "flat")) == ["one.txt", "three.json", "two.txt"]
    assert unpack(archive, tmp_path / "below", below="a", members=["*.txt"]) == 2
    assert sorted(_files(tmp_path / "below")) == ["b/two.txt", "one.txt"]
    (tmp_path / "all/three.json").write_bytes(b"half")
    unpack(archive, tmp_path / "all")
    assert _files(tmp_path / "all") == SOUND


def _link() -> zipfile.ZipInfo:
    member = zipfile.ZipInfo("a/link")
    member.create_system, member.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return member


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"../evil": b"x"}, "member '../evil' points out of its folder"),
        ({"a/../../evil": b"x"}, "points out of its folder"),
        ({"/tmp/evil": b"x"}, "points out of its folder"),
        ({"a\\..\\evil": b"x"}, "points out of its folder"),
        ({_link(): b"/etc/passwd"}, "member 'a/link' is not a regular file"),
        ({"a/same": b"x", "b/same": b"y"}, "two members same"),
    ],
)
def test_a_hostile_zip_is_refused(tmp_path: Path, files: dict[str | zipfile.ZipInfo, bytes], words: str) -> None:
    archive = _zip(tmp_path / "hostile.zip", files)
    with pytest.raises(ArchiveError, match="not to be trusted") as caught:
        unpack(archive, tmp_path / "out/in", flat="two" in words)
    assert words in str(caught.value)
    assert not any(path.name == "evil" or path.is_symlink() for path in tmp_path.rglob("*"))


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("../evil", {}, "points out of its folder"),
        ("/tmp/evil", {}, "points out of its folder"),
        ("a/link", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd", "size": 0}, "is not a regular file"),
        ("a/hard", {"type": tarfile.LNKTYPE, "linkname": "../../evil", "size": 0}, "is not a regular file"),
        ("a/pipe", {"type": tarfile.FIFOTYPE, "size": 0}, "is not a regular file"),
    ],
)
def test_a_hostile_tar_is_refused(tmp_path: Path, name: str, fields: dict[str, object], words: str) -> None:
    archive = _tar(tmp_path / "hostile.tar.gz", {name: b"x"}, **{name: fields})
    with pytest.raises(ArchiveError, match=words):
        unpack(archive, tmp_path / "out/in")
    assert _files(tmp_path / "out") == {}


def test_a_bomb_is_refused_before_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = _zip(tmp_path / "bomb.zip", {"zeros": bytes(8 << 20)})
    with pytest.raises(ArchiveError, match=r"bomb\.zip would unpack to more than"):
        unpack(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    sound = _zip(tmp_path / "sound.zip", dict(SOUND))
    monkeypatch.setattr(archives, "_free", lambda folder: 200)
    with pytest.raises(
        UserError, match=r"unpacks to more than 200 bytes, which .* has free; free some space"
    ) as caught:
        unpack(sound, tmp_path / "out")
    assert not isinstance(caught.value, ArchiveError)


def test_what_a_tar_only_passes_over_is_bounded_too(tmp_path: Path) -> None:
    archive = _tar(tmp_path / "bomb.tar.gz", {"zeros": bytes(64 << 20), "wanted.txt": b"x"})
    with pytest.raises(ArchiveError, match=r"bomb\.tar\.gz would unpack to more than [\d,]+ bytes"):
        unpack(archive, tmp_path / "out", members=["wanted.txt"])
    assert _files(tmp_path / "out") == {}


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_a_header_that_would_fill_the_memory_is_refused(
    tmp_path: Path, compress: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "_MAX_HEADER", 1 << 20)
    header = tarfile.TarInfo("long")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 2 << 20
    (tmp_path / "bomb.tar").write_bytes(compress(header.tobuf() + b"n" * (2 << 20) + bytes(1024)))
    with pytest.raises(ArchiveError, match=r"bomb\.tar has a header of 2,097,\d+ bytes; it is not to be trusted"):
        unpack(tmp_path / "bomb.tar", tmp_path / "out")


@pytest.mark.parametrize("make", [_zip, _tar])
def test_a_damaged_archive_is_one_line(tmp_path: Path, make: Callable[[Path, dict[str, bytes]], Path]) -> None:
    content = bytearray(make(tmp_path / "archive", {"noise": bytes(range(256)) * 50}).read_bytes())
    content[len(content) // 2] ^= 0xFF
    (tmp_path / "archive").write_bytes(content)
    with pytest.raises(ArchiveError, match=r"archive is damaged \(.*\); fetch it again"):
        unpack(tmp_path / "archive", tmp_path / "out")


def test_an_encrypted_member_and_a_page_are_no_archives(tmp_path: Path) -> None:
    content = bytearray(_zip(tmp_path / "secret.zip", {"a": b"x"}).read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "secret.zip").write_bytes(content)
    with pytest.raises(ArchiveError, match="member 'a' is encrypted"):
        unpack(tmp_path / "secret.zip", tmp_path / "out")
    (tmp_path / "page.zip").write_text("<html>moved</html>")
    with pytest.raises(ArchiveError, match="is neither a zip nor a tar archive"):
        unpack(tmp_path / "page.zip", tmp_path / "out")
