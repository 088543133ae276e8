"""Which files of a folder are data, and which of them are trained on, held out, or left for a test."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from inlay.data.records import refusal
from inlay.files.untrusted import from_json, read_regular
from inlay.messages import short

SPLITS = {  # the words by which the names of files and folders tell a split, as data sets of the Hub have them
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval", "evaluation", "heldout", "holdout"),
    "test": ("test", "testing"),
}
# What lies beside data without being any: hidden files, Spark's marks, texts about it, what `datasets` writes.
BESIDE = r"\..*|_(SUCCESS|metadata|common_metadata|started.*|committed.*)|dataset_(infos?|dict)\.json|state\.json"
ABOUT = r"(readme|licen[cs]e|citation|changelog|notice|requirements)\b.*"
TEXT = (".jsonl", ".json", ".csv", ".tsv", ".txt")  # may be packed, as .jsonl.gz


@dataclass
class Parts:
    """Hold the files of a folder by what they are for: "train", and "validation" where the folder has its own."""

    folder: Path
    files: dict[str, list[Path]]
    notes: list[str] = field(default_factory=list)
    left: list[Path] = field(default_factory=list)

    def by_split(self) -> dict[str, list[str]]:
        """Return the names of all data files by their split, those for a test first."""
        parts = {"test": self.left, **dict(reversed(self.files.items()))}
        return {name: [str(file.relative_to(self.folder)) for file in files] for name, files in parts.items() if files}


def folder_parts(folder: Path, split: str | None, kinds: str) -> Parts:
    """Return the files to read of a folder: those of one `split`, or those to train on and those to hold out.

    Raises:
        ValueError: no file is of a kind that is read, or of the split; or the splits are such that none is trained on.
    """
    if split is not None and "[" in split:
        raise refusal(
            folder, f"the split {split!r}", "the name of a split; a part of it is drawn by weight: 0.8 in data"
        )
    files, others = _data_files(folder, kinds)
    notes = [f"{folder.name}: passed over {short_list(others)}"] if others else []
    if split is not None:
        asked = split_of(Path(split))
        files = [f for f in files if _names(f, folder).startswith(split) or (asked and split_of(f, folder) == asked)]
    if not files:
        names = sorted(path.name for path in folder.glob("*"))
        raise refusal(folder, short(", ".join(names)), f"{split or ''}* of {kinds}")
    groups: dict[str, list[Path]] = {}
    for file in files:
        groups.setdefault(split_of(file, folder) or "", []).append(file)
    if split is not None or len(groups) == 1:
        return Parts(folder, {"train": files}, notes)
    train = groups.pop("train", None) or groups.pop("", None)
    if train is None:
        raise refusal(folder, f"the splits {', '.join(sorted(groups))}", "the name of one of them with --split")
    parts = {"train": train}
    said = f"{folder.name}: trained on {short_list(_relative(train, folder))}"
    if held := groups.pop("validation", None):
        parts["validation"] = held
        said += f", held out {short_list(_relative(held, folder))}"
    left = [file for group in groups.values() for file in group]
    if left:
        said += f", left {short_list(_relative(left, folder))}"
    return Parts(folder, parts, [*notes, f"{said} (--split names another)"], left)


def split_of(path: Path, folder: Path | None = None) -> str | None:
    """Return the split that the name of a file, or of a folder above it, tells; None where it tells none or several."""
    names = path.relative_to(folder).parts if folder else path.parts
    for name in reversed(names):
        words = re.split(r"[^a-z]+", name.lower())
        found = {split for split, known in SPLITS.items() if set(known) & set(words)}
        if found:
            return found.pop() if len(found) == 1 else None
    return None


def _data_files(folder: Path, kinds: str) -> tuple[list[Path], list[str]]:
    """Return the data files of a folder, of its subfolder `data` and of those named as splits, and the other files."""
    files, others = [], []
    listed = _saved_files(folder)
    for path in sorted(folder.iterdir()):
        if re.fullmatch(BESIDE, path.name) or re.fullmatch(ABOUT, path.name, re.IGNORECASE):
            continue
        if path.is_dir() and (path.name == "data" or split_of(Path(path.name))):
            inner, more = _data_files(path, kinds)
            files, others = files + inner, others + [f"{path.name}/{name}" for name in more]
        elif not path.is_dir() and kind_of(path) in kinds.split() and (listed is None or path.name in listed):
            files.append(path)
        else:
            others.append(path.name + ("/" if path.is_dir() else ""))
    return files, others


def kind_of(path: Path) -> str:
    """Return a file's suffix, without the .gz of a text file that is packed; .jsonl for its other names."""
    unpacked = Path(path.name.lower().removesuffix(".gz")).suffix
    unpacked = ".jsonl" if unpacked in (".ndjson", ".jsonlines") else unpacked
    return unpacked if unpacked in TEXT else path.suffix.lower()


def _saved_files(folder: Path) -> set[str] | None:
    """Return the names of the files that `Dataset.save_to_disk` put into a folder; None if it did not write it."""
    state = folder / "state.json"
    if not state.is_file():
        return None
    try:
        return {str(file["filename"]) for file in from_json(read_regular(state))["_data_files"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise refusal(state, short(str(error)), "what datasets' save_to_disk writes") from error


def _names(file: Path, folder: Path) -> str:
    return str(file.relative_to(folder))


def _relative(files: list[Path], folder: Path) -> list[str]:
    return [_names(file, folder) for file in files]


def short_list(names: list[str]) -> str:
    """Return some names, and how many more there are."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
