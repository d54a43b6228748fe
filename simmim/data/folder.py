"""Images below a folder: listing, classes, and a split that stays."""

import hashlib
import logging
import os
import time
from pathlib import Path
from typing import TypeVar

import numpy as np

from simmim.data.classes import classes_of_folders
from simmim.data.decoding import FORMATS, HEAD_BYTES, UnreadableImage, image_format
from simmim.data.files import FileSource, PackedStrings
from simmim.data.listings import CLOCK_TICK_NS, cache_file
from simmim.run_folder import whole_file

ARRAY_SUFFIX = ".npy"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ARRAY_SUFFIX)

Files = TypeVar("Files", bound=FileSource)

log = logging.getLogger(__name__)
_LISTING_VERSION = "simmim folder listing 2"


class FolderSource(FileSource):
    """The images below a folder, at any depth, sorted by path.

    Where every image lies in a sub-folder of `root`, the first-level folders are the classes, sorted by name,
    or by number where all names are numbers (so that class folders 0 to 999 keep their meaning). Otherwise
    the images have no labels. Arrays (.npy) are images where nothing else is: see `without_arrays`.

    Args:
        root: The folder; `~` is expanded.
        channels: What `load` returns: see `FileSource`.
        key: What the folder is called in messages.

    Raises:
        ValueError: If the folder does not exist, is no folder or holds no image.
    """

    def __init__(self, root: str | os.PathLike[str], *, channels: int = 3, key: str = "data.root") -> None:
        folder = Path(root).expanduser()
        require_folder(folder, key)
        names = PackedStrings.pack(without_arrays(list_images(folder), f"{key}={folder}"))
        if not len(names):
            raise ValueError(f"{key}={folder} holds no image ({', '.join(s[1:] for s in SUFFIXES)})")
        super().__init__(folder, names, *classes_of_folders(names), channels=channels, key=key)

    def read(self, index: int) -> bytes:
        """The content of an image's file.

        Raises:
            UnreadableImage: If it cannot be opened; the message does not name the file.
        """
        try:
            return Path(self.name(index)).read_bytes()
        except OSError as error:
            raise UnreadableImage(error.strerror or str(error)) from error

    def file_size(self, index: int) -> int:
        """Bytes of an image's file; 0 if it cannot be opened."""
        try:
            return Path(self.name(index)).stat().st_size
        except OSError:
            return 0

    def name(self, index: int) -> str:
        """Path of an image, as shown to a user."""
        return str(self.root / self.relative_name(index))


class SingleImage(FolderSource):
    """One image file, without a label.

    Args:
        file: The file.
        channels: What `load` returns: see `FileSource`.
        key: What the file is called in messages.
    """

    def __init__(self, file: Path, *, channels: int, key: str) -> None:
        names = PackedStrings.pack([file.name])
        FileSource.__init__(self, file.parent, names, *classes_of_folders(names), channels=channels, key=key)


def split_by_hash(source: Files, fraction: float) -> tuple[Files, Files]:
    """Set images aside for validation by a hash of their relative path.

    The same image lands on the same side on every machine and after other images have come or gone (where
    a side would be empty, the nearest hash changes sides).

    Args:
        source: At least two images, for both sides to hold one.
        fraction: Expected share of the second side, between 0 and 1.

    Returns:
        The sources for training and for validation, each in the order of `source`.

    Raises:
        ValueError: If `fraction` is not between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"data.val_fraction={fraction} must lie between 0 and 1, both excluded")
    position = np.array([_hash_position(source.relative_name(index)) for index in range(len(source))])
    aside = position < fraction
    if len(source) > 1:
        aside[position.argmin()] = True
        aside[position.argmax()] = False
    return source.subset(np.flatnonzero(~aside)), source.subset(np.flatnonzero(aside))


def list_images(root: Path) -> list[str]:
    """Relative POSIX paths of the images below `root`, sorted.

    Hidden files and folders are skipped. Each folder is visited once, however many links lead to it, and
    under its own name rather than a link's. A file counts as an image by its suffix, or by its first bytes if
    it has another one. The list is kept in the user's cache folder and used again while no visited folder has
    changed.
    """
    cache = cache_file("folder", _LISTING_VERSION, *SUFFIXES, os.path.realpath(root))
    names = _read_listing(cache, root) if cache else None
    if names is None:
        started = time.time_ns()
        names, folders = _walk(root)
        # A folder that changed within the clock's last tick may change again under the same time stamp.
        if cache and max(folders.values()) < started - CLOCK_TICK_NS:
            _write_listing(cache, names, folders)
    return names


def without_arrays(names: list[str], given: str) -> list[str]:
    """The images among files: arrays (.npy) beside pictures are their features or masks, and left out.

    Args:
        names: Of files.
        given: Where they are, for the log, which says so.
    """
    pictures = [name for name in names if not name.lower().endswith(ARRAY_SUFFIX)]
    if 0 < len(pictures) < len(names):
        log.warning(f"{given}: {len(names) - len(pictures):,} {ARRAY_SUFFIX} files beside images are left out")
    return pictures or names


def require_folder(root: Path, key: str) -> None:
    """Raises a ValueError unless `root` is a folder that can be read."""
    if not root.exists():
        raise ValueError(f"{key}={root} does not exist: give a folder of images")
    if not root.is_dir():
        raise ValueError(f"{key}={root} is not a folder: give the folder that holds the images")


def _walk(root: Path) -> tuple[list[str], dict[str, int]]:
    """The sorted images, and each folder's mtime in ns, by path relative to root ("" for root itself).

    Links to folders wait until the real folders are done, so that those keep their own names.
    """
    names: list[str] = []
    folders: dict[str, int] = {}
    visited: set[tuple[int, int]] = set()
    real, linked = [""], list[str]()
    while real or linked:
        folder = real.pop() if real else linked.pop(0)
        status = (root / folder).stat()
        if (status.st_dev, status.st_ino) in visited:
            continue
        visited.add((status.st_dev, status.st_ino))
        folders[folder] = status.st_mtime_ns  # taken before reading, so that a change meanwhile shows
        try:
            entries = _visible_entries(root / folder)
        except PermissionError as error:  # lost+found at the top of a disk, for one
            log.warning("%s cannot be listed, its images are left out: %s", root / folder, error.strerror)
            folders[folder] = time.time_ns()  # not to be cached: a change of permissions leaves the mtime alone
            continue
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_dir():
                (linked if entry.is_symlink() else real).append(name)
            elif _is_image(entry):
                names.append(name)
    return sorted(names), folders


def _visible_entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted((e for e in entries if not e.name.startswith(".")), key=lambda entry: entry.name)


def _is_image(entry: os.DirEntry[str]) -> bool:
    dangling = entry.is_symlink() and not os.path.exists(entry.path)
    if not entry.is_file() and not dangling:  # a pipe would block its reader
        return False
    if entry.name.lower().endswith(SUFFIXES):
        return True  # a broken link too: better reported when it is loaded than silently missing
    try:
        with open(entry.path, "rb") as file:
            return image_format(file.read(HEAD_BYTES)) in FORMATS
    except OSError:
        return False


def _hash_position(name: str) -> float:
    """A number in [0, 1) that depends on nothing but the name."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _read_listing(cache: Path, root: Path) -> list[str] | None:
    """The cached list of images, or None if there is none, it is damaged, or a folder has changed since."""
    try:
        with np.load(cache, allow_pickle=False) as arrays:
            names = PackedStrings(arrays["names"], arrays["name_ends"])
            folders = PackedStrings(arrays["folders"], arrays["folder_ends"])
            mtimes = arrays["folder_mtimes_ns"]
        if all((root / name).stat().st_mtime_ns == at for name, at in zip(folders, mtimes, strict=True)):
            return list(names)
    except Exception as error:  # a damaged zip raises half a dozen kinds; listing anew is always right
        log.debug("no usable listing in %s: %s", cache, error)
    return None


def _write_listing(cache: Path, names: list[str], folders: dict[str, int]) -> None:
    """Keeps a listing; a cache folder that cannot be written is no error."""
    packed, packed_folders = PackedStrings.pack(names), PackedStrings.pack(list(folders))
    try:
        with whole_file(cache) as temporary, temporary.open("wb") as file:
            np.savez_compressed(
                file,
                names=packed.text,
                name_ends=packed.ends,
                folders=packed_folders.text,
                folder_ends=packed_folders.ends,
                folder_mtimes_ns=np.array(list(folders.values()), dtype=np.int64),
            )
    except OSError as error:
        log.debug("the listing is not cached: %s", error)
