"""Parts by name: wheels made on the spot, real pip without an index, and all that can go wrong with an archive."""

import errno
import hashlib
import json
import os
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.hf_api import RepoFile, RepoSibling
from safetensors import SafetensorError

from instructblip.errors import UserError
from instructblip.fetch import parts as assets
from instructblip.fetch import wheels
from instructblip.fetch.parts import Sources, cache_folder, part_folder, part_settings
from instructblip.fetch.wheels import WheelSource

METADATA = "Metadata-Version: 2.1\nName: tiny-part\nVersion: 1.0\nClassifier: License :: OSI Approved :: MIT License\n"
MEMBERS = {
    "tiny_part/model/weights.bin": b"w" * 1000,
    "tiny_part/data/a.txt": b"a",
    "tiny_part/data/deep/b.txt": b"bb",
    "tiny_part/data/.DS_Store": b"junk",
    "tiny_part/data/.hidden/c.txt": b"junk",
    "tiny_part/code.py": b"raise SystemExit('never run')",
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a pip that has no index to ask."""
    monkeypatch.setenv("INSTRUCTBLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "cache"


@pytest.fixture
def without_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to start pip fails the test."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("pip was started")

    monkeypatch.setattr(wheels.subprocess, "Popen", fail)


def make_wheel(folder: Path, extra: dict[str | zipfile.ZipInfo, bytes] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny_part-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in [*MEMBERS.items(), *(extra or {}).items()]:
            wheel.writestr(name, content)
        wheel.writestr("tiny_part-1.0.dist-info/METADATA", METADATA)
        wheel.writestr("tiny_part-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("tiny_part-1.0.dist-info/LICENSE", "Do as you like.")
        wheel.writestr("tiny_part-1.0.dist-info/RECORD", "")
    return path


def source_of(path: Path, files: dict[str, str] | None = None) -> WheelSource:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return WheelSource("tiny-part", "1.0", digest, files or {"tiny_part/model/weights.bin": "model.bin"})


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("INSTRUCTBLIP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "instructblip"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "instructblip"


def test_a_local_folder_comes_first_and_must_exist(tmp_path: Path, cache: Path, without_pip: None) -> None:
    wheel = source_of(make_wheel(cache / "wheels"))
    assert part_folder(Sources("tiny", path=str(tmp_path), wheel=wheel)) == tmp_path
    with pytest.raises(UserError, match=r"^llm\.path=.*nowhere is not a folder"):
        part_folder(Sources("tiny", path=str(tmp_path / "nowhere"), wheel=wheel), setting="llm.path")


@pytest.mark.slow
def test_pip_fetches_with_the_users_configuration(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    wheel = source_of(make_wheel(tmp_path / "mirror"))
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "mirror"))
    folder = part_folder(Sources("tiny", wheel=wheel), progress=True)
    assert "fetching tiny-part 1.0" in capfd.readouterr().out
    assert folder == cache / "parts" / f"tiny-{wheel.sha256[:12]}"
    assert names_in(folder) == {"model.bin", "source.json"}
    assert (folder / "model.bin").read_bytes() == b"w" * 1000
    source = json.loads((folder / "source.json").read_text())
    assert source["recipe"]["wheel"]["sha256"] == wheel.sha256 and source["recipe"]["wheel"]["version"] == "1.0"
    assert (source["licence"], source["licence_text"]) == ("MIT License", "Do as you like.")
    assert [path.name for path in (cache / "parts").iterdir()] == [folder.name]


def test_a_cached_part_needs_neither_pip_nor_the_wheel(cache: Path, without_pip: None) -> None:
    archive = make_wheel(cache / "wheels")
    sources = Sources("tiny", wheel=source_of(archive))
    folder = part_folder(sources, progress=False)
    archive.unlink()
    (folder / "model.bin").touch()
    assert part_folder(sources, progress=False) == folder


def test_a_subtree_comes_without_hidden_files(cache: Path, without_pip: None) -> None:
    wheel = source_of(make_wheel(cache / "wheels"), {"tiny_part/data/": "", "tiny_part/model/": "weights"})
    folder = part_folder(Sources("tiny", wheel=wheel), progress=False)
    assert names_in(folder) == {"a.txt", "deep/b.txt", "weights/weights.bin", "source.json"}


@pytest.mark.slow
def test_offline_and_not_cached_is_one_line(cache: Path) -> None:
    wheel = WheelSource("tiny-part", "1.0", "ab" * 32, {"a": "a"})
    with pytest.raises(UserError) as caught:
        part_folder(Sources("tiny", wheel=wheel), progress=False, setting="llm.path")
    assert str(caught.value) == (
        "tiny is not in the cache and could not be fetched (No matching distribution found for tiny-part==1.0); "
        f"download tiny_part-1.0-*.whl (pip download --no-deps tiny-part==1.0, sha256 {'ab' * 32}) and put it into "
        f"{cache}/wheels/, or set llm.path=FOLDER"
    )
    assert list((cache / "parts").iterdir()) == []


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        (
            "WARNING: Retrying after NewConnectionError('x')\nERROR: No matching",
            "no connection to the package registry",
        ),
        ("/usr/bin/python: No module named pip", "this Python has no pip"),
        ("", "pip ended with status 3"),
    ],
)
def test_pips_reason_is_short(log: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(_command: list[str], _environment: dict[str, str], output: "wheels.BinaryIO", _tick: object) -> int:
        output.write(log.encode())
        return 3

    monkeypatch.setattr(wheels, "_run", run)
    with pytest.raises(UserError, match=f"could not be fetched \\({reason}\\); download"):
        part_folder(Sources("tiny", wheel=WheelSource("tiny-part", "1.0", "ab", {"a": "a"})), progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("by_pip", [False, True])
def test_a_wrong_sha256_names_both(by_pip: bool, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = make_wheel(tmp_path / "mirror" if by_pip else cache / "wheels")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "mirror"))
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    with pytest.raises(UserError, match=f"has sha256 {found}, expected {'0' * 64}"):
        part_folder(Sources("tiny", wheel=WheelSource("tiny-part", "1.0", "0" * 64, {"a": "a"})), progress=False)
    assert list((cache / "parts").iterdir()) == []


def symlink_member() -> zipfile.ZipInfo:
    member = zipfile.ZipInfo("tiny_part/links/passwd")
    member.create_system, member.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return member


@pytest.mark.parametrize(
    ("extra", "files", "message"),
    [
        ({"tiny_part/links/../../../evil": b""}, {"tiny_part/links/": ""}, "points out of its folder"),
        ({"tiny_part/links/\\evil": b""}, {"tiny_part/links/": ""}, "points out of its folder"),
        ({"/etc/evil": b""}, {"/etc/evil": "evil"}, "points out of its folder"),
        ({}, {"tiny_part/code.py": "../code.py"}, "points out of its folder"),
        ({symlink_member(): b"/etc/passwd"}, {"tiny_part/links/": ""}, "is not a regular file"),
        ({symlink_member(): b"/etc/passwd"}, {"tiny_part/links/passwd": "p"}, "is not a regular file"),
        ({}, {"tiny_part/missing.bin": "m"}, "has no member tiny_part/missing.bin"),
        ({}, {"tiny_part/nothing/": ""}, "has no member tiny_part/nothing/"),
        ({}, {"tiny_part/code.py": "x", "tiny_part/data/a.txt": "x"}, "two members would be written to x"),
    ],
)
def test_a_bad_archive_writes_nothing(
    extra: dict[str | zipfile.ZipInfo, bytes], files: dict[str, str], message: str, tmp_path: Path, cache: Path
) -> None:
    wheel = source_of(make_wheel(cache / "wheels", extra), files)
    with pytest.raises(UserError, match=message):
        part_folder(Sources("tiny", wheel=wheel), progress=False)
    assert list((cache / "parts").iterdir()) == []
    assert not any(path.name in ("evil", "passwd", "code.py") for path in tmp_path.rglob("*"))


def test_the_unpacked_size_is_bounded(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = source_of(make_wheel(cache / "wheels"))
    monkeypatch.setattr(wheels, "_MAX_UNPACKED_BYTES", 999)
    with pytest.raises(UserError, match="would unpack to 1000 bytes, allowed are 999"):
        part_folder(Sources("tiny", wheel=wheel), progress=False)


def disk_full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def disk_full_in_safetensors(*_: object) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        (disk_full, UserError, "is on a full disk; free some space"),
        (disk_full_in_safetensors, UserError, "is on a full disk; free some space"),
        (interrupted, KeyboardInterrupt, None),
    ],
)
def test_a_broken_unpacking_leaves_nothing_and_can_be_repeated(
    fault: Callable[..., None],
    error: type[BaseException],
    message: str | None,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wheel = source_of(make_wheel(cache / "wheels"), {"tiny_part/data/": "", "tiny_part/code.py": "code.py"})
    with monkeypatch.context() as patch:
        patch.setattr(wheels.shutil, "copyfileobj", fault)
        with pytest.raises(error, match=message):
            part_folder(Sources("tiny", wheel=wheel), progress=False)
        assert list((cache / "parts").iterdir()) == []
    assert "code.py" in names_in(part_folder(Sources("tiny", wheel=wheel), progress=False))


def test_what_a_killed_process_left_is_cleared(cache: Path) -> None:
    wheel = source_of(make_wheel(cache / "wheels"))
    left = cache / "parts" / f"tiny-{wheel.sha256[:12]}.partial" / "ready"
    left.mkdir(parents=True)
    (left / "half.bin").write_bytes(b"half")
    folder = part_folder(Sources("tiny", wheel=wheel), progress=False)
    assert names_in(folder) == {"model.bin", "source.json"} and not left.exists()


def test_a_damaged_or_differently_made_part_is_made_anew(cache: Path) -> None:
    archive = make_wheel(cache / "wheels")
    folder = part_folder(Sources("tiny", wheel=source_of(archive)), progress=False)
    (folder / "model.bin").write_bytes(b"cut")
    assert part_folder(Sources("tiny", wheel=source_of(archive)), progress=False) == folder
    assert (folder / "model.bin").stat().st_size == 1000
    other = source_of(archive, {"tiny_part/data/a.txt": "a.txt"})
    assert names_in(part_folder(Sources("tiny", wheel=other), progress=False)) == {"a.txt", "source.json"}


def damage(file: Path) -> None:
    """Flip a bit, the size stays."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["model.bin", "source.json"])
def test_a_flipped_bit_is_found_and_the_part_is_made_anew(cache: Path, name: str) -> None:
    sources = Sources("tiny", wheel=source_of(make_wheel(cache / "wheels")))
    folder = part_folder(sources, progress=False)
    damage(folder / name)
    assert part_folder(sources, progress=False) == folder
    assert (folder / "model.bin").read_bytes() == b"w" * 1000
    assert json.loads((folder / "source.json").read_text())["files"] == {
        "model.bin": {"bytes": 1000, "sha256": hashlib.sha256(b"w" * 1000).hexdigest()}
    }


@pytest.mark.slow
def test_damage_that_cannot_be_mended_here_is_one_line(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    archive = make_wheel(cache / "wheels")
    sources = Sources("tiny", wheel=source_of(archive))
    damage(part_folder(sources, progress=False) / "model.bin")
    archive.unlink()
    with pytest.raises(UserError, match=r"^tiny is damaged in the cache and could not be fetched anew \(No matching "):
        part_folder(sources, progress=False)
    assert "tiny is damaged in the cache, and is fetched anew" in caplog.text


def test_a_process_reads_a_part_once_to_check_it(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = Sources("tiny", wheel=source_of(make_wheel(cache / "wheels"), {"tiny_part/": ""}))
    part_folder(sources, progress=False)
    read: list[str] = []
    sha256_file = assets.sha256_file
    monkeypatch.setattr(assets, "sha256_file", lambda file: read.append(file.name) or sha256_file(file))
    assets._sha256.cache_clear()
    for _ in range(3):
        part_folder(sources, progress=False)
    assert sorted(read) == ["a.txt", "b.txt", "code.py", "weights.bin"]


def test_settings_are_read_without_reading_the_weights(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = make_wheel(cache / "wheels", {"tiny_part/config.json": b'{"hidden_size": 8}'})
    sources = Sources("tiny", wheel=source_of(archive, {"tiny_part/": ""}))
    part_folder(sources, progress=False)
    read: list[str] = []
    sha256_file = assets.sha256_file
    monkeypatch.setattr(assets, "sha256_file", lambda file: read.append(file.name) or sha256_file(file))
    assets._sha256.cache_clear()
    assert part_settings(sources, setting="llm.sources.path") == {"hidden_size": 8}
    assert read == ["config.json"]


def test_a_converter_replaces_the_original(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(source: Path, target: Path) -> None:
        (target / "model.safetensors").write_bytes((source / "model.bin").read_bytes()[:3])
        (target / "model.safetensors").chmod(0o600)

    monkeypatch.setitem(assets.CONVERTERS, "tiny", convert)
    wheel = source_of(make_wheel(cache / "wheels"))
    folder = part_folder(Sources("tiny", wheel=wheel, convert="tiny"), progress=True)
    assert names_in(folder) == {"model.safetensors", "source.json"}
    assert (folder / "model.safetensors").stat().st_mode == (folder / "source.json").stat().st_mode
    with pytest.raises(UserError, match="no converter tinny; there are efficientnet_pth, gguf, tiny"):
        part_folder(Sources("tiny", wheel=wheel, convert="tinny"))


@pytest.mark.slow
def test_the_hub_is_asked_last_and_its_snapshot_is_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    import huggingface_hub

    calls = []

    def download(repository: str, *, revision: str | None, allow_patterns: list[str], force_download: bool) -> str:
        calls.append((repository, revision, allow_patterns, force_download))
        (tmp_path / "snapshot").mkdir(exist_ok=True)
        (tmp_path / "snapshot" / "config.json").write_text("{}")
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    wheel = WheelSource("tiny-part", "1.0", "ab" * 32, {"a": "a"})
    sources = Sources("tiny", hub="someone/tiny", hub_revision="v1", hub_files=("*.json",), wheel=wheel)
    for _ in range(2):
        assert part_folder(sources, progress=False) == tmp_path / "snapshot"
    assert calls == [("someone/tiny", "v1", ["*.json"], False)]
    (tmp_path / "snapshot" / "config.json").unlink()
    assert part_folder(sources, progress=False) == tmp_path / "snapshot"
    assert len(calls) == 2
    damage(tmp_path / "snapshot" / "config.json")
    assert part_folder(sources, progress=False) == tmp_path / "snapshot"
    (cache / "hub/tiny.json").write_text("{")
    assert part_folder(sources, progress=False) == tmp_path / "snapshot"
    # The hub's own cache takes a file that is there for a good one, unless it is told otherwise.
    assert [anew for *_, anew in calls] == [False, True, True, False]


def test_an_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(
        UserError, match=r"\(Hugging Face hub: no answer for a/b, \w+\); fetch it where .*\(hf download a/b\), or set"
    ):
        part_folder(Sources("tiny", hub="a/b"), progress=False)
    with pytest.raises(UserError, match="tiny: hub repository a//b: Repo id must"):
        part_folder(Sources("tiny", hub="a//b"), progress=False)
    with pytest.raises(UserError, match="no source is named"):
        part_folder(Sources("tiny"), progress=False)


def test_a_hub_repository_with_a_file_outside_of_it_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    siblings = [RepoSibling(rfilename="../../../evil.json")]
    info = SimpleNamespace(sha="a" * 40, siblings=siblings)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.hf_api.HfApi.repo_info", lambda *_, **__: info)
    tree = [RepoFile(path="../../../evil.json", size=2, oid="b" * 40)]
    monkeypatch.setattr("huggingface_hub.hf_api.HfApi.list_repo_tree", lambda *_, **__: tree)
    with pytest.raises(UserError, match=r"tiny: hub repository a/b: Invalid filename .*evil\.json") as caught:
        part_folder(Sources("tiny", hub="a/b"), progress=False)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("evil.json"))


def test_a_registry_that_sends_more_than_the_wheel_has_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import os, time; open(os.path.join(os.environ['TMPDIR'], 'x'), 'wb').write(bytes(5000)); time.sleep(60)"
    run = wheels._run
    monkeypatch.setattr(wheels, "_run", lambda command, *rest: run([sys.executable, "-c", code], *rest))
    monkeypatch.setattr(wheels, "_SLACK_BYTES", 0)
    wheel = WheelSource("tiny-part", "1.0", "ab" * 32, {"a": "a"}, bytes=4000)
    with pytest.raises(UserError, match=r"the registry's file tiny_part-1\.0-\*\.whl has more than the 4,000 bytes"):
        part_folder(Sources("tiny", wheel=wheel), progress=False)


@pytest.mark.slow
def test_several_processes_at_once_make_the_part_once(cache: Path) -> None:
    wheel = source_of(make_wheel(cache / "wheels"))
    code = f"""
import os, pathlib
from instructblip.fetch import parts as assets
def convert(source, target):
    with open({str(cache / "made")!r}, "a") as file:
        file.write("x")
    os.replace(source / "model.bin", target / "model.bin")
assets.CONVERTERS["tiny"] = convert
wheel = assets.WheelSource("tiny-part", "1.0", {wheel.sha256!r}, {wheel.files!r})
print(assets.part_folder(assets.Sources("tiny", wheel=wheel, convert="tiny"), progress=False))
"""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, "-c", code], cwd=root, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    answers = {process.communicate()[0].strip() for process in processes}
    assert answers == {str(cache / "parts" / f"tiny-{wheel.sha256[:12]}")}
    assert (cache / "made").read_text() == "x"
