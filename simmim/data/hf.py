"""The images of a Hugging Face data set on the disk, as `save_to_disk` of the library `datasets` leaves it."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simmim.data.classes import classes_of_numbers
from simmim.data.decoding import UnreadableImage
from simmim.data.files import FileSource, PackedStrings, read_file

_INFO, _STATE, _SPLITS = "dataset_info.json", "state.json", "dataset_dict.json"


class HFSource(FileSource):
    """The rows of a data set, in their order. An image is called by the number of its row.

    Images lie in the data set itself, or in files that it names: absolute, or below its folder.

    Args:
        root: The folder that `save_to_disk` wrote; `~` is expanded. Of several splits each has a folder of its own.
        image_column: The column of the images; None: the only one of the type `Image`.
        label_column: The column of the labels, of the type `ClassLabel` or whole numbers; None: the only one of the
            type `ClassLabel`, or no labels where there is none.
        channels: What `load` returns: see `FileSource`.
        key: What `root` is called in messages.

    Raises:
        ValueError: If there is no such data set, or several splits; if it is damaged or empty; if a column is missing,
            of another type, or one of several; if only some rows have a label; without the
            library `datasets`.
    """

    how_to_label = "name their column, data.label_column=…, of the type ClassLabel or whole numbers"

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        image_column: str | None = None,
        label_column: str | None = None,
        channels: int = 3,
        key: str = "data.root",
    ) -> None:
        folder = _dataset_folder(Path(root).expanduser(), key)
        rows = _load(folder, key)
        image = image_column or _only_column(rows, "Image", "data.image_column", f"{key}={folder}")
        if image is None:
            raise ValueError(
                f"{key}={folder} has no column of the type Image (it has {', '.join(rows.column_names)}): give "
                "data.image_column=…"
            )
        classes, labels = _labels(rows, label_column, f"{key}={folder}")
        names = PackedStrings.pack([f"{row:09d}" for row in range(len(rows))])
        super().__init__(folder, names, classes, labels, channels=channels, key=key)
        self._image = image
        self._rows = _encoded(rows, image, f"{key}={folder}")

    def read(self, index: int) -> bytes:
        """The encoded image of a row.

        Raises:
            UnreadableImage: If the row has none, or its file cannot be opened.
        """
        row = self._row(index)
        if row["bytes"] is not None:
            return bytes(row["bytes"])
        if row["path"] is None:
            raise UnreadableImage("the row has no image")
        return read_file(_inside(self.root, row["path"]))

    def file_size(self, index: int) -> int:
        """Bytes of an encoded image; 0 if it cannot be read."""
        try:
            return len(self.read(index))
        except UnreadableImage:
            return 0

    def name(self, index: int) -> str:
        """Folder, row, and the image's own name if it has one, as shown to a user."""
        try:
            path = self._row(index)["path"]
        except UnreadableImage:
            path = None
        return f"{self.root}:row {self._indices[index]}{f' ({path})' if path else ''}"

    def _row(self, index: int) -> dict[str, Any]:
        try:
            row: dict[str, Any] | None = self._rows[int(self._indices[index])][self._image]
        except (OSError, ValueError) as error:
            raise UnreadableImage(str(error).splitlines()[0] if str(error) else type(error).__name__) from error
        return row or {"bytes": None, "path": None}


def _dataset_folder(folder: Path, key: str) -> Path:
    """The folder of a data set, or of the only split of several."""
    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "does not exist"
        raise ValueError(f"{key}={folder} {problem}: give the folder that save_to_disk wrote")
    if (folder / _SPLITS).is_file():
        splits = _json(folder / _SPLITS, key).get("splits")
        if not isinstance(splits, list) or not all(_is_plain(split) for split in splits) or not splits:
            raise ValueError(f"{key}={folder}: {_SPLITS} names no splits: save the data set anew")
        if len(splits) > 1:
            raise ValueError(
                f"{key}={folder} has the splits {', '.join(splits)}: give the folder of one, {key}={folder / splits[0]}"
            )
        folder = folder / splits[0]
    if not (folder / _INFO).is_file() or not (folder / _STATE).is_file():
        raise ValueError(
            f"{key}={folder} is no data set of the library datasets (it lacks {_INFO} or {_STATE}): save_to_disk "
            "writes one, and data=folder reads images that lie in a folder"
        )
    files = _json(folder / _STATE, key).get("_data_files")
    if files == []:
        raise ValueError(f"{key}={folder} has no rows")
    names = [file.get("filename") if isinstance(file, dict) else None for file in files or [None]]
    if planted := [name for name in names if not _is_plain(name)]:
        raise ValueError(f"{key}={folder}: {_STATE} names {planted[0]!r}, which is no file of the data set")
    if lacking := [name for name in names if not (folder / str(name)).is_file()]:
        raise ValueError(f"{key}={folder} lacks {lacking[0]}: copy the data set anew")
    return folder


def _json(path: Path, key: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{key}: {path} is no JSON ({type(error).__name__}): copy the data set anew") from error
    return content if isinstance(content, dict) else {}


def _is_plain(name: Any) -> bool:
    """Whether this is the name of something in a folder, and no path, which would lead elsewhere."""
    return isinstance(name, str) and name not in ("", ".", "..") and not {"/", "\\", "\0"} & set(name)


def _load(folder: Path, key: str) -> Any:
    try:
        from datasets import Dataset
    except ImportError as error:
        raise ValueError("data=hf needs the library datasets: pip install 'simmim[hf]'") from error
    try:
        return Dataset.load_from_disk(os.path.abspath(folder), keep_in_memory=False).with_format(None)
    except Exception as error:  # damaged bytes make readers raise anything: ArrowInvalid, KeyError, …
        reason = str(error).splitlines()[0] if str(error) else ""
        raise ValueError(
            f"{key}={folder} cannot be read ({type(error).__name__}: {reason}): copy the data set anew"
        ) from error


def _only_column(rows: Any, kind: str, key: str, given: str) -> str | None:
    """The column of this type; None if there is none."""
    found = [name for name, feature in rows.features.items() if type(feature).__name__ == kind]
    if len(found) > 1:
        raise ValueError(f"{given} has the columns {', '.join(found)} of the type {kind}: give {key}=…")
    return found[0] if found else None


def _encoded(rows: Any, column: str, given: str) -> Any:
    """The column of the images alone, their bytes and paths as they are."""
    from datasets import Image

    _require_column(rows, column, "data.image_column", given)
    try:
        return rows.select_columns([column]).cast_column(column, Image(decode=False))
    except Exception as error:  # a kind each of datasets and of pyarrow
        feature = type(rows.features[column]).__name__
        raise ValueError(f"{given}: data.image_column={column} holds no images ({feature})") from error


def _labels(rows: Any, column: str | None, given: str) -> tuple[list[str], NDArray[np.int32]]:
    """Class names and labels; refuses rows without a label among others that have one."""
    column = column or _only_column(rows, "ClassLabel", "data.label_column", given)
    if column is None:
        return [], np.full(len(rows), -1, dtype=np.int32)
    _require_column(rows, column, "data.label_column", given)
    feature = rows.features[column]
    if not str(getattr(feature, "dtype", "")).lstrip("u").startswith("int"):
        raise ValueError(f"{given}: data.label_column={column} holds no whole numbers ({feature})")
    numbers = np.array([-1 if number is None else number for number in rows[column]], dtype=np.int64)
    if 0 < (bare := int((numbers < 0).sum())) < len(numbers):
        raise ValueError(
            f"{given}: {bare:,} of {len(numbers):,} rows have no label in {column}, the first being row "
            f"{int(np.argmax(numbers < 0))}: label all or none"
        )
    names = list(getattr(feature, "names", None) or [])
    if bare or not names:
        return classes_of_numbers(numbers)
    if numbers.max() >= len(names):
        raise ValueError(f"{given}: {column} holds the label {numbers.max()}, and {len(names)} names")
    return names, numbers.astype(np.int32)


def _require_column(rows: Any, column: str, key: str, given: str) -> None:
    if column not in rows.column_names:
        raise ValueError(f"{given}: {key}={column} is no column of it: choose one of {', '.join(rows.column_names)}")


def _inside(folder: Path, path: str) -> Path:
    """The file that a row names.

    Raises:
        UnreadableImage: If it lies elsewhere than on the disk, or above the folder.
    """
    if "://" in path or "::" in path:
        raise UnreadableImage(f"at {path}: only files on the disk are read")
    if ".." in Path(path).parts:
        raise UnreadableImage(f"{path} leads out of the data set")
    return folder / path
