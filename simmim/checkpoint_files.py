"""Checkpoints on disk: one file, or a folder with a part of each process.

Both are whole or absent, carry checksums, and are read without running any code of theirs. A checkpoint is a tree of
dicts, lists and plain values with tensors as leaves. In a folder the sharded tensors (DTensor) lie in
torch.distributed.checkpoint's format under their path in the tree, `/state_dict/<name>`, and `rest.pt` holds the tree
without them.
"""

import io
import pickle
import shutil
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors
from torch.distributed.tensor import DTensor, distribute_tensor

from simmim.run_folder import flush, partial_name, whole_file

REST = "rest.pt"
METADATA = ".metadata"
CHECKSUMS = "checksums"

Tree = dict[str, Any]

_UNREADABLE = "cannot be read: it was cut short, or holds more than tensors and plain values"

METADATA_CLASSES = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("torch", "device"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
}
"""What the metadata of a folder may be made of, besides the data types of PyTorch."""


def save_file(checkpoint: Tree, path: Path) -> None:
    """Writes a checkpoint as one file."""
    with whole_file(path) as temporary:
        _save(checkpoint, temporary)


def save_folder(checkpoint: Tree, path: Path) -> None:
    """Writes the parts of all processes to a folder, which appears when all of them are on the disk.

    Every process calls it.

    Args:
        checkpoint: The same tree everywhere, with each process's part of the sharded tensors.
        path: The folder.

    Raises:
        OSError: On every process, if one of them could not write.
    """
    tensors: dict[str, Tensor] = {}
    rest = _split(checkpoint, tensors)
    partial = path.with_name(partial_name(path))
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
    dist.barrier()
    try:
        save_tensors(tensors, storage_writer=FileSystemWriter(partial, single_file_per_rank=True, sync_files=True))
    except CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        _everywhere(lambda: shutil.rmtree(partial, ignore_errors=True))
        raise OSError(_one_line(reason)) from error
    own = [file for file in partial.glob(f"__{dist.get_rank()}_*")]
    checksums: list[dict[str, list[int]]] = [{}] * dist.get_world_size()
    dist.all_gather_object(checksums, {file.name: list(_checksum(file)) for file in own})

    def complete() -> None:
        everything = {METADATA: list(_checksum(partial / METADATA))}
        for part in checksums:
            everything |= part
        _save({**rest, CHECKSUMS: everything}, partial / REST)
        for name in (REST, METADATA, "."):
            flush(partial / name)
        partial.replace(path)
        flush(path.parent)

    _everywhere(complete)


def is_folder_of_shards(path: Path) -> bool:
    """Whether this is a checkpoint that is a folder, damaged or not."""
    return path.suffix == ".ckpt" or (path / REST).is_file() or (path / METADATA).is_file()


def load(path: Path, *, keep: str = "/") -> Tree:
    """Reads a checkpoint into the memory of this process, tensors in full.

    Args:
        path: File or folder.
        keep: Of a folder, the tensors whose path begins so; None stands for the others. A file's tensors are read
            from the disk when they are used.

    Raises:
        ValueError: If it holds more than tensors and plain values, or cannot be read.
    """
    with _readable(path):
        if path.is_file():
            checkpoint: Tree = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            return checkpoint
        described = _metadata(path).state_dict_metadata
        tensors: dict[str, Any] = {
            key: torch.empty(entry.size, dtype=entry.properties.dtype)
            for key, entry in described.items()
            if key.startswith(keep) and isinstance(entry, TensorStorageMetadata)
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # so it is meant
            load_tensors(tensors, storage_reader=_Reader(path), planner=_Planner(), no_dist=True)
        tree: Tree = _join(_rest(path), tensors)
        return tree


def load_rest(path: Path) -> Tree:
    """Reads a checkpoint without its sharded tensors; a file's are read when they are used. Raises as `load` does."""
    return load(path, keep="nothing")


def load_shards(path: Path, like: Callable[[str], DTensor | None]) -> Tree:
    """Reads each process's part of a checkpoint, written by any number of processes. Every process calls it.

    Args:
        path: File or folder.
        like: For the path of a tensor in the tree, the sharded tensor that is overwritten with it; None for a tensor
            that stays as it is.

    Returns:
        The tree, with the sharded tensors in it.

    Raises:
        ValueError: As `load`.
    """
    if path.is_file():
        tree: Tree = _shard(load(path), like)
        return tree
    with _readable(path):
        tensors: dict[str, Any] = {key: like(key) for key in _metadata(path).state_dict_metadata}
        load_tensors(tensors, storage_reader=_Reader(path), planner=_Planner())
        tree = _join(_rest(path), tensors)
        return tree


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Says in one line what cannot be read."""
    try:
        yield
    except CheckpointException as error:
        raise ValueError(f"{path} {_UNREADABLE} ({_one_line(next(iter(error.failures.values()))[0])})") from error
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        raise ValueError(f"{path} {_UNREADABLE} ({_one_line(error)})") from error


def damage(path: Path) -> str:
    """What is wrong with a checkpoint on the disk, by its checksums: empty if nothing is."""
    try:
        broken = zipfile.ZipFile(path / REST if path.is_dir() else path).testzip()
        if broken is not None:
            return f"damaged at {broken}"
        if path.is_file():
            return ""
        for name, (size, checksum) in _rest(path, checksums=True)[CHECKSUMS].items():
            if Path(name).name != name:
                return f"{CHECKSUMS} point outside of the folder, to {name}"
            if (path / name).stat().st_size != size:
                return f"{name} has {(path / name).stat().st_size:,} bytes instead of {size:,}"
            if _checksum(path / name)[1] != checksum:
                return f"damaged at {name}"
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        return _one_line(error)
    return ""


class _Unpickler(pickle.Unpickler):
    """Knows the classes of the metadata and no others: nothing that a stranger plants is ever called."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in METADATA_CLASSES:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong there")


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return _metadata(Path(self.path))


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        raise pickle.UnpicklingError("an object among the tensors")


def _metadata(folder: Path) -> Metadata:
    with (folder / METADATA).open("rb") as file:
        metadata = _Unpickler(file).load()
    if not isinstance(metadata, Metadata):
        raise pickle.UnpicklingError(f"{METADATA} holds a {type(metadata).__name__}")
    for info in metadata.storage_data.values():
        if Path(info.relative_path).name != info.relative_path:
            raise pickle.UnpicklingError(f"{METADATA} points outside of the folder, to {info.relative_path}")
    return metadata


def _rest(folder: Path, *, checksums: bool = False) -> Tree:
    rest: Tree = torch.load(folder / REST, map_location="cpu", weights_only=True)
    if not checksums:
        rest.pop(CHECKSUMS, None)
    return rest


def _split(tree: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """The tree with None for each sharded tensor, which goes to tensors under its path."""
    if isinstance(tree, DTensor):
        tensors[path] = tree
        return None
    if isinstance(tree, dict):
        return {key: _split(value, tensors, f"{path}/{key}") for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_split(value, tensors, f"{path}/{key}") for key, value in enumerate(tree)]
    return tree


def _join(tree: Any, tensors: dict[str, Any], path: str = "") -> Any:
    """Undoes `_split`."""
    if isinstance(tree, dict):
        return {key: _join(value, tensors, f"{path}/{key}") for key, value in tree.items()}
    if isinstance(tree, list):
        return [_join(value, tensors, f"{path}/{key}") for key, value in enumerate(tree)]
    return tensors.get(path, tree)


def _shard(tree: Any, like: Callable[[str], DTensor | None], path: str = "") -> Any:
    """The tree with the own part of each tensor that is sharded."""
    if isinstance(tree, dict):
        return {key: _shard(value, like, f"{path}/{key}") for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_shard(value, like, f"{path}/{key}") for key, value in enumerate(tree)]
    own = like(path) if isinstance(tree, Tensor) else None
    if own is None:
        return tree
    full = tree.to(own.device)
    with torch.no_grad():
        own.copy_(distribute_tensor(full, own.device_mesh, own.placements, src_data_rank=None))
    return own


def _everywhere(action: Callable[[], None]) -> None:
    """Does something on the first process; if it fails there, every process raises."""
    outcome: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except OSError as error:
            outcome = [_one_line(error)]
    dist.broadcast_object_list(outcome)
    if outcome[0] is not None:
        raise OSError(outcome[0])


def _save(tree: Tree, path: Path) -> None:
    try:
        with path.open("wb") as file:  # given a path, PyTorch would not say why it cannot write
            torch.save(tree, file)
    except RuntimeError as error:  # its writer's, after that of the file
        raise error.__context__ if isinstance(error.__context__, OSError) else OSError(_one_line(error)) from None


def _checksum(path: Path) -> tuple[int, int]:
    """Size in bytes, and CRC-32."""
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(2**22):
            checksum = zlib.crc32(block, checksum)
        return file.tell(), checksum


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
