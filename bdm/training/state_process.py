"""A process that writes states, so that the interpreter of the one that trains is not held meanwhile.

``torch.save`` holds it while it copies and sums up bytes. The processes share memory: what is to be written
is copied there once, and nothing is sent.
"""

from __future__ import annotations

import io
import logging
import mmap
import os
import pickle
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("bdm")

#: Bytes by which the shared memory grows at least.
SEGMENT = 64 * 2**20
#: Smaller contents are written by the process that trains: starting another takes longer.
LEAST = 64 * 2**20
#: Tensors begin at multiples of this many bytes.
_ALIGNED = 64


def torch_save(content: Any, path: Path) -> None:
    """Write tensors and plain containers into a file."""
    with open(path, "wb") as file:
        torch.save(content, file)


class SharedBuffers:
    """Memory of tensors for one state after the other, in the same places: only the first has to get it."""

    def __init__(self) -> None:
        self.file = os.memfd_create("bdm-state")
        self._segments: list[tuple[int, mmap.mmap, int]] = []  # offset in the file, memory, its address
        self.size = self.copied = self._segment = self._used = 0

    def reset(self) -> None:
        """Begin with the next state; copies of the one before are overwritten."""
        self.copied = self._segment = self._used = 0

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor, with its strides."""
        return self.room(tensor).copy_(tensor)

    def room(self, tensor: Tensor) -> Tensor:
        """The same with whatever values."""
        self.copied += tensor.nbytes
        memory, place = self._free(max(_ALIGNED, tensor.nbytes))
        flat = torch.frombuffer(memory, dtype=tensor.dtype, count=max(1, tensor.numel()), offset=place)
        strides = torch.empty_like(tensor, device="meta").stride()
        return flat.as_strided(tensor.shape, strides)

    def place_of(self, tensor: Tensor) -> int | None:
        """Where in the file a tensor begins; None for one that is elsewhere."""
        for offset, memory, address in self._segments:
            if address <= tensor.data_ptr() < address + len(memory):
                return offset + tensor.data_ptr() - address
        return None

    def close(self) -> None:
        """Give the memory back, once nothing uses copies any more."""
        os.close(self.file)
        self._segments.clear()

    def _free(self, size: int) -> tuple[mmap.mmap, int]:
        while True:
            if self._segment == len(self._segments):
                self._grow(size)
            memory = self._segments[self._segment][1]
            if self._used + size <= len(memory):
                place, self._used = self._used, -(-(self._used + size) // _ALIGNED) * _ALIGNED
                return memory, place
            self._segment, self._used = self._segment + 1, 0

    def _grow(self, size: int) -> None:
        length = -(-max(size, SEGMENT) // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        os.ftruncate(self.file, self.size + length)
        memory = mmap.mmap(self.file, length, offset=self.size)
        address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
        self._segments.append((self.size, memory, address))
        self.size += length


class StateProcess:
    """Writes files of tensors that are in shared buffers, in a process of its own.

    It is started with the first content that is large enough. Where it cannot be, or ends, this process
    writes itself.

    Args:
        buffers: where the tensors are.
    """

    def __init__(self, buffers: SharedBuffers) -> None:
        self._buffers = buffers
        self._process: subprocess.Popen[bytes] | None = None
        self._lost = False

    def save(self, content: Any, path: Path) -> None:
        """Write tensors and plain containers into a file.

        Raises:
            OSError: as the process that writes says it.
        """
        if self._lost or self._buffers.copied < LEAST:
            torch_save(content, path)
            return
        try:
            trouble = self._asked(content, path)
        except (OSError, EOFError, struct.error) as error:
            logger.warning("the process that writes states is lost (%s); this one writes them", error)
            self._lost = True
            self.close()
            torch_save(content, path)
            return
        if trouble:
            raise OSError(trouble)

    def _asked(self, content: Any, path: Path) -> str:
        if self._process is None:
            command = "import sys; from bdm.training.state_process import serve; serve(int(sys.argv[1]))"
            self._process = subprocess.Popen(
                [sys.executable, "-c", command, str(self._buffers.file)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=[self._buffers.file],
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        sent = io.BytesIO()
        _Sender(sent, self._buffers).dump((str(path), content))
        _send(self._process.stdin, sent.getvalue())
        return _receive(self._process.stdout).decode()

    def close(self) -> None:
        """Let the process end."""
        if self._process is not None:
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            self._process.wait()
            self._process = None


class _Sender(pickle.Pickler):
    """Says of tensors in the buffers where they are."""

    def __init__(self, file: io.BytesIO, buffers: SharedBuffers) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._buffers = buffers

    def persistent_id(self, obj: Any) -> Any:
        place = self._buffers.place_of(obj) if isinstance(obj, Tensor) else None
        return None if place is None else (place, obj.dtype, tuple(obj.shape), obj.stride())


class _Receiver(pickle.Unpickler):
    """Finds them there; what was one tensor is one."""

    def __init__(self, file: io.BytesIO, memory: mmap.mmap) -> None:
        super().__init__(file)
        self._memory = memory
        self._found: dict[Any, Tensor] = {}

    def persistent_load(self, pid: Any) -> Tensor:
        if pid not in self._found:
            place, dtype, shape, strides = pid
            count = max(1, torch.Size(shape).numel())
            flat = torch.frombuffer(self._memory, dtype=dtype, count=count, offset=place)
            self._found[pid] = flat.as_strided(shape, strides)
        return self._found[pid]


def serve(file: int, save: Callable[[Any, Path], None] = torch_save) -> None:
    """Write what comes over standard input, until it ends.

    Signals to stop are for the process that trains, which still saves.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    parent, answers = os.getppid(), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints must not answer
    while True:
        try:
            asked = _receive(sys.stdin.buffer)
        except (EOFError, struct.error):
            return
        trouble = ""
        try:
            size = os.fstat(file).st_size
            path, content = _Receiver(io.BytesIO(asked), mmap.mmap(file, size)).load()
            if os.getppid() != parent:  # another run may write there by now
                return
            save(content, Path(path))
        except (OSError, RuntimeError) as error:
            trouble = str(error).splitlines()[0] or type(error).__name__
        try:
            _send(answers, trouble.encode())
        except BrokenPipeError:  # nobody waits for it any more
            os._exit(0)


def _send(pipe: Any, content: bytes) -> None:
    pipe.write(struct.pack("<Q", len(content)) + content)
    pipe.flush()


def _receive(pipe: Any) -> bytes:
    (size,) = struct.unpack("<Q", pipe.read(8))
    content = pipe.read(size)
    if len(content) != size:
        raise EOFError("it ended")
    return content
