"""Tables of a dataset on the Hugging Face hub, fetched by the hub's own client into its cache. No code of a dataset runs."""

import re
from fnmatch import fnmatchcase
from pathlib import Path

from instructblip.errors import UserError
from instructblip.fetch.parts import hub_errors
from instructblip.fetch.wheels import UnreachableError

TABLES = (".parquet", ".jsonl", ".json", ".csv", ".tsv")
_PLACE = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w.-]+))?(?:/(?P<path>\S+))?")


def hub_files(place: str, split: str) -> list[Path]:
    """Fetch the tables of a split, in the order of their names; what the cache has is taken from there without a network.

    Args:
        place: `OWNER/NAME`, with `@REVISION` for another one than the newest, and with `/PATH` for a file, a pattern of
            files (`*`) or a folder of them, such as one of several configurations.
        split: whose files: those that have its name as a word of theirs, as `data/train-00000-of-00002.parquet`. A path to
            files is taken as it stands.

    Raises:
        UserError: no such place, no tables of that split, those of several folders, or no answer.
    """
    import huggingface_hub

    match = _PLACE.fullmatch(place.rstrip("/"))
    if match is None:
        raise UserError(
            f"hf://datasets/{place} is no dataset of the hub; write hf://datasets/OWNER/NAME[@REVISION][/PATH]"
        )
    repository, path = match["repository"], match["path"] or ""
    exact = path.endswith(TABLES)
    patterns = [path] if exact else [f"{path}/*{split}*{kind}".lstrip("/") for kind in TABLES]
    try:
        with hub_errors(place, repository):
            folder = Path(
                huggingface_hub.snapshot_download(
                    repository, repo_type="dataset", revision=match["revision"], allow_patterns=patterns
                )
            )
    except UnreachableError as error:
        raise UserError(
            f"hf://datasets/{place} cannot be fetched ({error}); download its files and name them"
        ) from None
    return _chosen(folder, patterns, None if exact else split, place)


def _chosen(folder: Path, patterns: list[str], split: str | None, place: str) -> list[Path]:
    """The files of a snapshot that match as the hub's client matches: `*` stands for folders too."""
    named = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    word = re.compile(rf"(?<![A-Za-z0-9_]){re.escape(split or '')}(?![A-Za-z0-9_])")
    files = [
        path
        for name, path in named.items()
        if any(fnmatchcase(name, pattern) for pattern in patterns) and (split is None or word.search(name))
    ]
    if not files:
        wanted = (
            "such file" if split is None else f"tables ({', '.join(TABLES)}) with the split's name {split} in theirs"
        )
        raise UserError(f"hf://datasets/{place} has no {wanted}; name them: hf://datasets/OWNER/NAME/PATH")
    folders = sorted({path.parent.relative_to(folder).as_posix() for path in files})
    if split is not None and len(folders) > 1:
        raise UserError(
            f"hf://datasets/{place} has tables of split {split} in {', '.join(folders[:8])}; name one of these folders: "
            "hf://datasets/OWNER/NAME/FOLDER"
        )
    return files
