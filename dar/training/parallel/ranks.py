"""`Ranks`: communication between the processes of one training run, beside torch's collectives.

A reward may take an hour. A process that waits for it inside a collective of torch exceeds that
collective's time limit, and meanwhile learns neither that training should stop nor that another
process has failed. So everything but the model's tensors goes through a key-value store, the one
that the process group was formed with. Every wait there polls whether another process has failed,
and has no time limit.

Values are JSON and tensors, so reading one never runs code.
"""

import contextlib
import itertools
import json
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeVar, cast

import safetensors.torch
import torch
from torch import Tensor
from torch.distributed import (  # type: ignore[attr-defined]  # torch's annotations leave them out
    DistError,
    PrefixStore,
    Store,
    TCPStore,
    distributed_c10d,
)

import dar.errors
from dar.errors import DARError, Problem, TrainingError
from dar.training.report.sink import StopRequestedError

T = TypeVar("T")

SHORTEST_PAUSE, LONGEST_PAUSE = 0.0005, 0.05
"""Seconds between two polls of the store, growing during a wait. The store's own wait is not used,
because it logs each of its time limits."""
PARTING_SECONDS = 5.0
"""Longest wait of the main process for the others at the end; one of them may be dead."""
PIECE_BYTES = 2**22
"""Largest value of one key; a torch store refuses 8 MiB."""
ABORT = "abort"
"""Key of the first error."""
TENSOR = "$tensor"
"""Key of the JSON object that stands for a tensor."""


class ProcessFailedError(RuntimeError):
    """Another process of this training run has failed, or cannot be reached."""


class Ranks:
    """The processes of a training run; with one process, everything is the identity.

    Args:
        index: Number of this process, from 0.
        count: Number of processes.
        store: The store that all of them can reach; None for one process.
    """

    _made: ClassVar[Iterator[int]] = itertools.count()

    def __init__(self, index: int = 0, count: int = 1, store: Store | None = None) -> None:
        assert count == 1 or store is not None
        self.index = index
        self.count = count
        self._whole_store = store
        self._epoch = -1
        self._number = 0
        self._stale: list[str] = []
        self._fresh: list[str] = []
        self._begin_epoch()

    @classmethod
    def of_launch(cls, index: int, count: int) -> "Ranks":
        """The processes of torch's process group, as torchrun, accelerate or a worker started them.

        All of them must call this equally often.
        """
        number = next(cls._made)
        if count == 1:
            return cls()
        met = distributed_c10d._get_default_store()  # noqa: SLF001 - torch has no public name for it
        return cls(index, count, PrefixStore(f"dar-ranks-{number}", met))

    @property
    def is_main(self) -> bool:
        """Whether this process scores, reports and writes checkpoints."""
        return self.index == 0

    def slice(self, n: int) -> range:
        """This process's contiguous share of ``n`` items."""
        return self.slice_of(self.index, n)

    def slice_of(self, index: int, n: int) -> range:
        """The share of process ``index``; the shares of all, in order, make up ``range(n)``."""
        return range(n * index // self.count, n * (index + 1) // self.count)

    def gather(self, value: T) -> list[T]:
        """The value of every process, by index, on every process.

        Args:
            value: JSON and tensors; tuples are returned as lists, and tensors on the CPU.

        Raises:
            DARError: Another process failed with it.
            StopRequestedError: Another process received a request to stop.
            ProcessFailedError: Another process failed in some other way, or is gone.
        """
        if self.count == 1:
            return [value]
        number = self._next()
        self._put(f"{number}/{self.index}", value)
        values = [
            value if index == self.index else self._take(f"{number}/{index}")
            for index in range(self.count)
        ]
        self._forget()
        return values

    def from_main(self, make: Callable[[], T]) -> T:
        """Call ``make`` on the main process only, for any length of time; all return its value.

        Args:
            make: Returns JSON and tensors.

        Raises:
            DARError: ``make`` raised it, or another process failed with it.
            StopRequestedError: The same.
            ProcessFailedError: ``make`` raised another error (the main process raises that one), or
                a process failed.
        """
        if self.count == 1:
            return make()
        number = self._next()
        if not self.is_main:
            answer = self._take(f"{number}/main")
            if "error" in answer:
                raise _read_error(answer["error"])
            return cast("T", answer["value"])
        try:
            value = make()
        except BaseException as error:
            self._put(f"{number}/main", {"error": _error_as_json(error, self.index)})
            raise
        self._put(f"{number}/main", {"value": value})
        return value

    def look(self) -> None:
        """Raise if another process has failed. Cheap; never waits.

        Raises:
            DARError: Another process failed with it.
            StopRequestedError: Another process received a request to stop.
            ProcessFailedError: Another process failed in some other way, or is gone.
        """
        if self.count > 1:
            with _reaching():
                failure = self._store.get(ABORT) if self._store.check([ABORT]) else None
            if failure is not None:
                raise _read_error(json.loads(failure))

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """If one process raises inside, all raise; all must enter and leave in the same order.

        Afterwards they can still communicate, each from its own ``except``.

        Raises:
            DARError: The first process that failed raised it.
            StopRequestedError: The same.
            ProcessFailedError: The first process that failed raised another error, which is in its
                own log.
        """
        try:
            yield
        except BaseException as error:
            if self.count == 1:
                raise
            first = self._agree(error)
            if first is None:
                raise
            raise first from error
        finally:
            self._part()
            self._begin_epoch()

    def _part(self) -> None:
        """Let the main process wait until the others have read all: it may host the store."""
        if self.count == 1:
            return
        with contextlib.suppress(DistError):
            self._store.set(f"left/{self.index}", "")
            others = [f"left/{index}" for index in range(self.count)]
            until = time.monotonic() + PARTING_SECONDS
            while self.is_main and not self._store.check(others) and time.monotonic() < until:
                time.sleep(SHORTEST_PAUSE)

    def _agree(self, error: BaseException) -> BaseException | None:
        """Publish ``error`` if it is the first; return the first, or None if that is ``error``."""
        mine = json.dumps(_error_as_json(error, self.index))
        try:
            first = self._store.compare_set(ABORT, "", mine).decode()
        except DistError:
            return None  # the process that held the store is dead
        return None if first == mine else _read_error(json.loads(first))

    # --- the store -------------------------------------------------------------------------------

    def _begin_epoch(self) -> None:
        self._epoch += 1
        self._number = 0
        self._stale, self._fresh = [], []
        if self._whole_store is not None:
            self._store = PrefixStore(f"{self._epoch}", self._whole_store)

    def _next(self) -> str:
        self._number += 1
        return f"{self._number}"

    def _put(self, key: str, value: object) -> None:
        content = encode(value)
        pieces = [content[i : i + PIECE_BYTES] for i in range(0, len(content), PIECE_BYTES)]
        names = [f"{key}.{i}" for i in range(len(pieces))]
        with _reaching():
            for name, piece in zip(names, pieces, strict=True):
                self._store.set(name, piece)  # type: ignore[arg-type]  # annotated as str, also takes bytes
            self._store.set(key, f"{len(pieces)}")
        self._fresh += [key, *names]

    def _take(self, key: str) -> Any:  # noqa: ANN401 - any value that was put
        pause = SHORTEST_PAUSE
        while not self._is_there(key):
            self.look()
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        with _reaching():
            count = int(self._store.get(key))
            return decode(b"".join(self._store.get(f"{key}.{i}") for i in range(count)))

    def _is_there(self, key: str) -> bool:
        with _reaching():
            return self._store.check([key])

    def _forget(self) -> None:
        """Remove keys that all processes have read.

        A process that has put a value in this round has read all values up to the previous one.
        """
        with _reaching():
            for key in self._stale:
                self._store.delete_key(key)
        self._stale, self._fresh = self._fresh, []


@contextlib.contextmanager
def _reaching() -> Iterator[None]:
    try:
        yield
    except torch.distributed.DistNetworkError as error:
        raise ProcessFailedError(
            "the main process of this training run cannot be reached any more: it has ended, or "
            f"the network between the machines is broken ({error})"
        ) from error


def meet(index: int, count: int, *, port: int, listener: int | None) -> None:
    """Form torch's process group on the loopback address; torch itself listens on all addresses.

    Args:
        index: Number of this process, from 0.
        count: Number of processes.
        port: Port that process 0 listens on.
        listener: File descriptor of its socket; None in the other processes.

    Raises:
        TrainingError: There are GPUs, but not one for each process.
    """
    gpus = torch.cuda.device_count()
    if 0 < gpus < count:
        raise TrainingError(
            f"the job needs {count} processes with a GPU each, but the worker's slot has {gpus}; "
            "send fewer processes, or run it on a worker with a larger slot (DAR_DEVICES)",
            param="method.dar.resources.processes",
        )
    store = TCPStore("127.0.0.1", port, count, index == 0, master_listen_fd=listener)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(index)
    torch.distributed.init_process_group(backend, store=store, rank=index, world_size=count)


# --- values as bytes -----------------------------------------------------------------------------


def encode(value: object) -> bytes:
    """JSON with tensors as bytes: the length of the JSON, the JSON, the tensors as safetensors.

    Raises:
        TypeError: The value holds something else.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_plain(value, tensors)).encode()
    return struct.pack("<Q", len(text)) + text + safetensors.torch.save(tensors)


def decode(content: bytes) -> Any:  # noqa: ANN401 - any value that was encoded
    """The value that `encode` got, with lists for tuples and with tensors on the CPU."""
    start = struct.calcsize("<Q")
    end = start + struct.unpack_from("<Q", content)[0]
    tensors = safetensors.torch.load(content[end:])
    return _whole(json.loads(content[start:end]), tensors)


def _plain(value: object, tensors: dict[str, Tensor]) -> object:
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {TENSOR: name}
    if isinstance(value, Mapping):
        return {key: _plain(item, tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, tensors) for item in value]
    return value


def _whole(value: object, tensors: Mapping[str, Tensor]) -> object:
    if isinstance(value, dict):
        if value.keys() == {TENSOR}:
            return tensors[value[TENSOR]]
        return {key: _whole(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_whole(item, tensors) for item in value]
    return value


# --- errors as JSON ------------------------------------------------------------------------------


def _error_as_json(error: BaseException, index: int) -> dict[str, Any]:
    fields: dict[str, Any] = {"class": type(error).__name__, "message": str(error), "index": index}
    if isinstance(error, DARError):
        fields |= {
            "param": error.param,
            "code": error.error_code,
            "problems": [problem.as_json() for problem in error.problems],
            "retry_after_seconds": error.retry_after_seconds,
        }
    return fields


def _read_error(fields: Mapping[str, Any]) -> BaseException:
    cls = getattr(dar.errors, fields["class"], None)
    if isinstance(cls, type) and issubclass(cls, DARError):
        problems: Sequence[Mapping[str, Any]] = fields["problems"]
        return cls(
            fields["message"],
            param=fields["param"],
            code=fields["code"],
            problems=[Problem(**problem) for problem in problems],
            retry_after_seconds=fields["retry_after_seconds"],
        )
    if fields["class"] == StopRequestedError.__name__:
        return StopRequestedError(fields["message"])
    if fields["class"] == torch.OutOfMemoryError.__name__:
        return torch.OutOfMemoryError(fields["message"])
    return ProcessFailedError(
        f"process {fields['index']} of this training run has failed with {fields['class']}: "
        f"{fields['message']}"
    )
