"""Image files inside of a few large ones, each read where it lies: nothing is unpacked to the disk."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simmim.data.decoding import UnreadableImage
from simmim.data.files import FileSource
from simmim.data.listings import Listing


class PackedSource(FileSource):
    """The images of some archives, archive by archive.

    Args:
        root: The folder that holds them.
        archives: Their paths.
        listings: For each of them its images.
        classes: Class names; empty for unlabelled images.
        labels: For each image an index into `classes`, or -1 without classes.
        channels: 1 (grey), 3 (RGB) or 4 (RGBA): what `load` returns.
        key: What the archives are called in messages.

    Raises:
        ValueError: For other `channels`.
    """

    def __init__(
        self,
        root: Path,
        archives: Sequence[Path],
        listings: Sequence[Listing],
        classes: list[str],
        labels: NDArray[np.int32],
        *,
        channels: int,
        key: str,
    ) -> None:
        everything = Listing.joined(listings)
        super().__init__(root, everything.names, classes, labels, channels=channels, key=key)
        self.archives = list(archives)
        self.columns = everything.columns
        counts = [len(listing.names) for listing in listings]
        self._archive_of = np.repeat(np.arange(len(listings), dtype=np.int32), counts)

    def read(self, index: int) -> bytes:
        """The content of an image's file.

        Raises:
            UnreadableImage: If its archive cannot be read.
        """
        return self.read_at(index, self.column("offsets", index), self.column("lengths", index))

    def read_at(self, index: int, offset: int, length: int) -> bytes:
        """Some bytes of the archive that holds an image.

        The archive is opened each time, so that no processes share a position in it.

        Raises:
            UnreadableImage: If the archive cannot be read.
        """
        try:
            with open(self.archive(index), "rb", buffering=0) as file:
                file.seek(offset)
                return file.read(length)
        except OSError as error:
            raise UnreadableImage(error.strerror or str(error)) from error

    def archive(self, index: int) -> Path:
        """The archive that holds an image."""
        return self.archives[int(self._archive_of[self._indices[index]])]

    def column(self, name: str, index: int) -> int:
        """What the listing says of an image."""
        return int(self.columns[name][self._indices[index]])

    def file_size(self, index: int) -> int:
        """Bytes of an image's file."""
        return self.column("lengths", index)

    def name(self, index: int) -> str:
        """Archive and name of an image, as shown to a user."""
        return f"{self.archive(index)}:{self._names[self._indices[index]]}"
