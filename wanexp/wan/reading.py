"""Tensors of checkpoint files, read by several threads ahead of who asks for them, straight to where they shall lie.

    file --read--> pinned staging --copy on a stream beside the computing one--> tensor on a GPU    (each thread)
    file --read--> tensor on a CPU

One thread copies out of the page cache at a fraction of what a GPU's link takes, and pages on a disk want several
requests at once. Threads do both: reading and copying to a device let go of Python's lock.
"""

import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from queue import SimpleQueue

import torch
from torch import Tensor

from wanexp.wan.part import Part
from wanexp.wan.safetensors_format import TORCH_DTYPES, ByteRows, StoredTensor

NUM_THREADS = 8
LEAVE_S = 5.0  # that threads are waited for where something went wrong: a read may never return
# Read and copied at once. Each thread has two pinned buffers of it for GPUs, 256 MiB in all: the first touch of host
# memory is slow, and what is used again and again stays in the processor's cache.
PIECE_BYTES = 16 * 2**20
# Of tensors that are being read or wait to be asked for; the last of them may go beyond.
AHEAD_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Wanted:
    """A tensor of a file, or a part of it, and the device that it shall lie on."""

    stored: StoredTensor
    device: torch.device
    part: Part | None = None


class Reader:
    """Reads the tensors of `wanted`, in their order, while it is entered; they are taken in the same order.

    Threads begin with the first `take`, and have ended when the reader is left, whatever the reason.
    """

    def __init__(self, wanted: Iterable[Wanted]) -> None:
        self._to_come = deque(wanted)
        self._under_way: deque[_Reading] = deque()
        self._bytes_under_way = 0
        self._pieces: SimpleQueue[tuple[_Reading, int, int] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._is_left = False

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        self._is_left = True
        for _ in self._threads:
            self._pieces.put(None)
        for thread in self._threads:
            thread.join(None if kind is None else LEAVE_S)
        for stream in self._streams.values():
            stream.synchronize()  # the memory of tensors that nobody took goes back now

    def take(self, wanted: Wanted) -> Tensor:
        """The next tensor, as stored (dtype of the file), in contiguous memory of its own on its device.

        Raises CheckpointError if its file cannot be read or has become shorter since its header was read.
        """
        self._begin()
        reading = self._under_way.popleft()
        assert reading.wanted == wanted, "tensors are taken in the order in which they were announced"
        reading.is_done.wait()
        if reading.error is not None:
            raise reading.error
        self._bytes_under_way -= reading.tensor.nbytes
        if reading.stream is not None:
            torch.cuda.current_stream(reading.tensor.device).wait_stream(reading.stream)
        return reading.tensor

    def _begin(self) -> None:
        """Let the threads read as far ahead as memory is meant for it."""
        # Memory is allocated here and not in the threads, so that it belongs to the stream of whoever takes it.
        while self._to_come and (not self._under_way or self._bytes_under_way < AHEAD_BYTES):
            wanted = self._to_come.popleft()
            reading = _Reading(wanted)
            if reading.tensor.device.type == "cuda":
                reading.stream = self._copy_stream(reading.tensor.device)
                # Behind whatever the memory was used for before.
                reading.stream.wait_stream(torch.cuda.current_stream(reading.tensor.device))
            self._under_way.append(reading)
            self._bytes_under_way += reading.tensor.nbytes
            for start, stop in reading.pieces:
                self._pieces.put((reading, start, stop))
                if len(self._threads) < NUM_THREADS:
                    # Daemons: a read that never returns (a dead network disk) must not keep the process alive.
                    thread = threading.Thread(target=self._work, name="checkpoint reader", daemon=True)
                    thread.start()
                    self._threads.append(thread)

    def _copy_stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

    def _work(self) -> None:
        staging = _Staging()
        with torch.inference_mode():  # writes to any tensor, also to those that were made in this mode
            while self._next_piece(staging):
                pass

    def _next_piece(self, staging: "_Staging") -> bool:
        # A function of its own, as its variables would keep the last tensor alive while a thread waits for another.
        piece = self._pieces.get()
        if piece is None:
            return False
        reading, start, stop = piece
        error = None
        try:
            if not self._is_left and reading.error is None:
                reading.read(start, stop, staging)
        except BaseException as caught:  # whatever it is, it belongs to who waits for the tensor
            error = caught
        reading.end_piece(error)
        return True


class _Staging:
    """The pinned buffers of one thread, used by turns."""

    def __init__(self) -> None:
        self._buffers: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def take(self) -> Tensor:
        """uint8 [PIECE_BYTES] that no copy reads any more."""
        if len(self._buffers) < 2:
            # torch keeps pinned memory and gives it out again: the next model's threads get the same pages.
            return torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True)
        buffer, copied = self._buffers.popleft()
        copied.synchronize()
        return buffer

    def give(self, buffer: Tensor, copied: torch.cuda.Event) -> None:
        self._buffers.append((buffer, copied))


class _Reading:
    """One tensor on its way."""

    def __init__(self, wanted: Wanted) -> None:
        self.wanted, self.rows = wanted, ByteRows.of(wanted.stored, wanted.part)
        shape = wanted.part.shape_in(wanted.stored.shape) if wanted.part else wanted.stored.shape
        self.tensor = torch.empty(shape, dtype=TORCH_DTYPES[wanted.stored.dtype], device=wanted.device)
        step = PIECE_BYTES // self.rows.width * self.rows.width if self.rows.is_short else PIECE_BYTES
        num_bytes = self.tensor.nbytes
        self.pieces = [(start, min(start + step, num_bytes)) for start in range(0, num_bytes, step)]
        self.stream: torch.cuda.Stream | None = None  # that copies it to a GPU
        self.error: BaseException | None = None
        self.is_done = threading.Event()
        self._lock, self._num_left = threading.Lock(), len(self.pieces)
        if not self.pieces:
            self.is_done.set()

    def read(self, start: int, stop: int, staging: _Staging) -> None:
        """Bytes `start` to `stop` - 1 of the tensor, from the file to its device."""
        target = self.tensor.reshape(-1).view(torch.uint8)[start:stop]
        if target.device.type == "cpu":
            self.rows.read(target, start)
        elif self.stream is None:
            buffer = torch.empty(target.shape, dtype=torch.uint8)
            self.rows.read(buffer, start)
            target.copy_(buffer)
        else:
            with torch.cuda.stream(self.stream):  # and on its device: a thread begins on the first
                buffer = staging.take()
                self.rows.read(buffer[: len(target)], start)
                target.copy_(buffer[: len(target)], non_blocking=True)
                staging.give(buffer, self.stream.record_event(torch.cuda.Event(blocking=True)))

    def end_piece(self, error: BaseException | None) -> None:
        """The last piece to end says that all have."""
        with self._lock:
            self.error = self.error or error
            self._num_left -= 1
            if not self._num_left:
                self.is_done.set()


def read_tensor(
    stored: StoredTensor, device: torch.device, part: Part | None = None, reader: Reader | None = None
) -> Tensor:
    """The tensor, or a part of it, as stored (dtype of `stored`), in memory of its own on `device`.

    Only the bytes of the part are read. reader: what it was announced to; without one it is read now. Host memory in
    use: nothing beside the result on a CPU, the pinned buffers of the threads for a GPU. Raises CheckpointError if the
    file cannot be read or has become shorter since its header was read.
    """
    wanted = Wanted(stored, device, part)
    if reader is not None:
        return reader.take(wanted)
    with Reader([wanted]) as alone:
        return alone.take(wanted)
