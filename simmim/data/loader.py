"""Loader processes that die or hang, with the name of the image that they held."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import Process, RawArray
from multiprocessing.connection import wait
from typing import Any, Generic, TypeVar

from torch.utils.data import DataLoader, Dataset, get_worker_info

T = TypeVar("T")

_IDLE = -1.0
_LOOK_EVERY = 1.0  # s, while a batch is awaited, for processes that died


class Notes:
    """What each loader process holds at the moment, in memory that they share with the training process.

    Args:
        workers: Number of loader processes.
    """

    def __init__(self, workers: int) -> None:
        self._entries: Any = RawArray("d", [_IDLE, 0.0] * workers) if workers else []

    def write(self, index: float) -> None:
        """Called in a loader process: it begins with an image, or with none if the index is negative."""
        if (worker := get_worker_info()) is not None:
            self._entries[2 * worker.id : 2 * worker.id + 2] = (index, time.monotonic())

    def read(self, worker: int) -> tuple[int, float] | None:
        """Index of the image that a process holds, and for how many seconds; None if it holds none."""
        index, since = self._entries[2 * worker : 2 * worker + 2]
        return None if index == _IDLE else (int(index), time.monotonic() - since)


@dataclass(frozen=True)
class Noting(Generic[T]):
    """Makes batches as `collate` does; then the process holds no image any more."""

    collate: Callable[[Sequence[Any]], T]
    notes: Notes

    def __call__(self, samples: Sequence[Any]) -> T:
        """See above."""
        batch = self.collate(samples)
        self.notes.write(_IDLE)
        return batch


class WatchedLoader(DataLoader[Any]):
    """A DataLoader that says which image a loader process held when it died or hung.

    A death is told where the next batch is taken, and only there.

    Args:
        dataset: Calls `notes.write(index)` for each image that it begins with.
        notes: Of as many processes as `num_workers`.
        name: What to call the image at an index.
        timeout: Seconds that a batch may take, where there are loader processes.
        num_workers: See `DataLoader`.
        collate_fn: See `DataLoader`.
        **options: See `DataLoader`.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        notes: Notes,
        name: Callable[[int], str],
        timeout: float,
        num_workers: int,
        collate_fn: Callable[[Sequence[Any]], Any],
        **options: Any,
    ) -> None:
        self.notes, self.name, self.limit = notes, name, timeout
        super().__init__(
            dataset,
            num_workers=num_workers,
            timeout=min(_LOOK_EVERY, timeout) if num_workers else 0,
            collate_fn=Noting(collate_fn, notes),
            **options,
        )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yields the batches.

        Raises:
            ValueError: If a loader process died or hung.
        """
        if not self.num_workers:
            yield from super().__iter__()
            return
        with _signal_handler_kept():
            batches: Any = super().__iter__()
        while True:
            try:
                batch = self._next(batches)
            except StopIteration:
                return
            yield batch

    def _next(self, batches: Any) -> Any:
        started = time.monotonic()
        while True:
            try:
                return next(batches)
            except (RuntimeError, OSError, EOFError) as error:
                waited = str(error).startswith("DataLoader timed out")
                # Else the connection to a process broke, which shows a moment before its end does.
                self._refuse_dead(batches._workers, patience=0 if waited else 1)
                if not waited:
                    raise
                if time.monotonic() - started >= self.limit:
                    raise self._hung(batches._workers) from error

    def _refuse_dead(self, workers: Sequence[Process], patience: float) -> None:
        ended = wait([process.sentinel for process in workers], patience)
        for worker, process in enumerate(workers):
            if process.sentinel in ended:
                process.join()
                _kill(workers)
                held, code = self.notes.read(worker), process.exitcode
                what = f"while it read {self.name(held[0])}" if held else "between two images"
                raise ValueError(f"a loader process died ({_cause(code)}) {what}: {self._advice(code)}")

    def _hung(self, workers: Sequence[Process]) -> ValueError:
        held = filter(None, map(self.notes.read, range(len(workers))))
        index, seconds = max(held, key=lambda note: note[1], default=(None, 0.0))
        _kill(workers)
        what = "" if index is None else f": {self.name(index)} was being read for {seconds:.0f} s"
        return ValueError(
            f"no batch came for data.timeout={self.limit:g} s{what}: see that its disk answers, remove the "
            f"image, or give a longer data.timeout"
        )

    def _advice(self, exitcode: int | None) -> str:
        if exitcode == -signal.SIGBUS:
            return "shared memory ran out: fewer data.num_workers, or more of it (docker run --shm-size=8g)"
        return "fewer data.num_workers if memory ran out, else remove the image"


def default_workers(*, on_gpu: bool) -> int:
    """Loader processes: the machine's cores, at most 8, beside a GPU; one where the work itself needs the cores."""
    return min(8, os.cpu_count() or 1) if on_gpu else 1


def end_with_the_command(worker: int) -> None:
    """Leaves Ctrl-C to the command, and ends when that is gone: with nobody to read, a worker would wait for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _signal_handler_kept() -> Iterator[None]:
    """PyTorch's own handler would raise wherever the training stands, in the middle of a checkpoint for one."""
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, previous)


def _kill(workers: Sequence[Process]) -> None:
    """Asked to end, one that hangs would not hear it, nor one that waits for a lock which a dead one held."""
    for process in workers:
        process.kill()


def _cause(exitcode: int | None) -> str:
    return f"killed by signal {-exitcode}" if exitcode is not None and exitcode < 0 else f"exit code {exitcode}"
