"""Records the C calls of a forward once and makes them again in one C call: a CUDA graph for the CPU.

The model definition runs in Python over static buffers while the compiled kernels' functions are watched; the
list of their calls, with all pointers and numbers, is the recording. Values in the buffers may change between
replays, shapes and pointers may not; only the number of rows may, where two recordings show which numbers
follow it. What is done to values outside the kernels cannot be recorded: it is noticed and refused, never left out.
"""

from __future__ import annotations

import ctypes
import struct
import threading
import weakref
from collections.abc import Callable, Sequence
from ctypes import Structure, c_double, c_float, c_int64, c_void_p
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lapis.kernels.ops import Ops

WORDS, REALS = 24, 2  # as in cpu_replay.c
ALIGNMENT = 64
MOST_RECORDINGS = 128  # of one model; older ones are made again when they are wanted again
FEW, MORE = 3, 4  # rows of the two recordings that stand for any number of them

Outputs = tuple[Tensor, ...]
Forward = Callable[[], Outputs]
Calls = list[tuple[str, tuple[Any, ...]]]
Words = NDArray[np.int64]
_RECORDING = threading.Lock()


class Unrecordable(Exception):
    """Part of a forward cannot be recorded; the text says which."""


class CCall(Structure):
    """`struct call` of cpu_replay.c."""

    _fields_ = (
        ("function", c_void_p),
        ("team", c_int64),
        ("word", c_int64 * WORDS),
        ("real", c_double * REALS),
    )


class Arena:
    """Memory for the intermediates of recordings of up to `rows` rows; a block is reused once its tensor is gone.

    Recordings share it, since only one of them runs at a time. A block has room for the most rows; of memory
    that was never written the system keeps none. The oldest block that fits is taken, so that the same forward
    gets the same blocks again.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.blocks: list[NDArray[np.uint8]] = []
        self._free: set[int] = set()  # places in blocks

    def tensor(self, shape: Sequence[int], dtype: torch.dtype, rows: int) -> Tensor:
        """An empty tensor of a forward of so many rows."""
        size = int(np.prod(shape)) * dtype.itemsize
        wanted = max(1, -(-size // rows) * self.rows)
        at = min((at for at in self._free if len(self.blocks[at]) >= wanted), default=len(self.blocks))
        if at == len(self.blocks):
            raw = np.empty(wanted + ALIGNMENT, dtype=np.uint8)
            start = -raw.ctypes.data % ALIGNMENT
            self.blocks.append(raw[start : start + wanted])
        self._free.discard(at)
        part = self.blocks[at][:size]  # lives as long as the tensor's storage, views included
        weakref.finalize(part, self._free.add, at)
        return torch.from_numpy(part).view(dtype).view(shape)

    def borrowed(self, tensor: Tensor, rows: int | None = None) -> Tensor:
        """The same memory without a claim on it: to be read before anything else is run in this arena.

        With `rows` it has so many in place of the tensor's own.
        """
        shape = tensor.shape if rows is None else (rows, *tensor.shape[1:])
        size = int(np.prod(shape)) * tensor.element_size()
        for block in self.blocks:
            start = tensor.data_ptr() - block.ctypes.data
            if start >= 0 and start + size <= len(block):
                return torch.from_numpy(block[start : start + size]).view(tensor.dtype).view(shape)
        return tensor


class Recording:
    """One forward as a list of C calls, and what it keeps alive."""

    def __init__(self, functions: SimpleNamespace, calls: Calls) -> None:
        self._kept = [calls]  # the structures that pointers lead to
        self._calls = (CCall * len(calls))()
        self._replay = functions.replay
        for place, (name, arguments) in zip(self._calls, calls, strict=True):
            _write(place, functions, name, arguments)

    def __len__(self) -> int:
        return len(self._calls)

    @property
    def words(self) -> Words:
        """All calls as whole numbers, to be read and changed."""
        return np.frombuffer(memoryview(self._calls), np.int64)

    def run(self) -> None:
        """Make all calls."""
        self._replay(self._calls, len(self._calls))


class RowsRecording:
    """A forward of any number of rows: of its calls recorded for FEW and for MORE rows, what differs follows them."""

    def __init__(self, functions: SimpleNamespace, few: Calls, more: Calls) -> None:
        if [name for name, _ in few] != [name for name, _ in more]:
            raise Unrecordable("other kernels are called for another number of rows")
        self._scaled: list[tuple[Words, NDArray[np.intp], Words]] = []  # numbers, which, each for a row
        few, more = self._with_own_structures(few, more)
        self._recording = Recording(functions, more)
        self._scale(Recording(functions, few).words, self._recording.words)

    def __len__(self) -> int:
        return len(self._recording)

    def run(self, rows: int) -> None:
        """Make all calls for so many rows."""
        for words, places, each in self._scaled:
            words[places] = each * rows
        self._recording.run()

    def _scale(self, few: Words, more: Words) -> None:
        places = np.flatnonzero(few != more)
        each = more[places] - few[places]
        if not np.array_equal(each * FEW, few[places] * (MORE - FEW)):
            raise Unrecordable("numbers of a call follow the number of rows otherwise than in proportion")
        self._scaled.append((more, places, each // (MORE - FEW)))

    def _with_own_structures(self, few: Calls, more: Calls) -> tuple[Calls, Calls]:
        """The calls with one structure of our own in place of the two that a pointer leads to."""
        own: dict[tuple[int, int], Any] = {}
        ours: tuple[Calls, Calls] = [], []
        for (name, small), (_, large) in zip(few, more, strict=True):
            pairs = [
                self._own(a._obj, b._obj, own) if hasattr(b, "_obj") else (a, b)
                for a, b in zip(small, large, strict=True)
            ]
            ours[0].append((name, tuple(a for a, _ in pairs)))
            ours[1].append((name, tuple(b for _, b in pairs)))
        return ours

    def _own(self, small: Structure, large: Structure, own: dict[tuple[int, int], Any]) -> tuple[Any, Any]:
        key = id(small), id(large)
        if key not in own:
            copy = type(large).from_buffer_copy(large)
            self._scale(np.frombuffer(memoryview(small), np.int64), np.frombuffer(memoryview(copy), np.int64))
            own[key] = ctypes.byref(copy)
        return own[key], own[key]


class Replay:
    """Forwards of one model on static buffers, recorded by a key that fixes their shapes and their buffers.

    `weights` are those that may change.
    """

    def __init__(self, ops: Ops, weights: Sequence[Tensor], rows: int) -> None:
        kernels = getattr(ops, "kernels", None)
        if kernels is None:
            raise Unrecordable(f"{ops.name} kernels make no C calls")
        if not kernels._c.replayable():
            raise Unrecordable("calls cannot be replayed on this kind of machine")
        self._kernels = kernels
        self._weights = list(weights)
        self._counted = [weight for weight in self._weights if not weight.is_inference()]
        self._arena = Arena(rows)
        self._state = self._weights_state()
        self._recordings: dict[object, tuple[Recording, Outputs]] = {}
        self._by_rows: tuple[RowsRecording, Outputs] | None = None

    def run(self, key: object, rows: int, forward: Forward) -> Outputs:
        """What `forward`, of so many rows and without gradients, returns: overwritten by the next run.

        The first call of a key records; after a weight has changed, everything is recorded anew. Raises
        Unrecordable.
        """
        self._drop_stale()
        found = self._recordings.get(key)
        if found is None:
            while len(self._recordings) >= MOST_RECORDINGS:
                del self._recordings[next(iter(self._recordings))]
            found = self._recordings[key] = self._record(rows, forward)
        else:
            found[0].run()
        return found[1]

    def run_rows(self, rows: int, forward: Callable[[int], Outputs]) -> Outputs:
        """As `run` for any number of rows, at least MORE, with one recording made of forwards of few of them.

        `forward` is given how many of the rows in the static buffers it shall take, from the first one on.
        """
        self._drop_stale()
        if self._by_rows is None:
            forward(FEW)  # packs weights, as in _record
            forward(MORE)
            few, _ = self._watch(FEW, lambda: forward(FEW))
            more, outputs = self._watch(MORE, lambda: forward(MORE))
            self._by_rows = RowsRecording(self._kernels._c, few, more), outputs
        recording, outputs = self._by_rows
        recording.run(rows)
        return tuple(self._arena.borrowed(output, rows) for output in outputs)

    @property
    def memory_bytes(self) -> int:
        """Address space of all intermediates; of memory that was never written the system keeps none."""
        return sum(len(block) for block in self._arena.blocks)

    def _record(self, rows: int, forward: Forward) -> tuple[Recording, Outputs]:
        forward()  # packs weights and prepares the batch, so that the recorded run does neither
        calls, outputs = self._watch(rows, forward)
        return Recording(self._kernels._c, calls), outputs

    def _watch(self, rows: int, forward: Forward) -> tuple[Calls, Outputs]:
        """The calls of a forward in the arena, and what it returns, lent."""
        kernels = self._kernels
        with _RECORDING:
            functions = kernels._c
            watched = _Watched(functions)
            kernels._c = watched
            try:
                with _OnlyKernels(self._arena, rows):
                    outputs = forward()
            finally:
                kernels._c = functions
        return watched.calls, tuple(self._arena.borrowed(output) for output in outputs)

    def _drop_stale(self) -> None:
        """Recordings of weights that have changed since."""
        state = self._weights_state()
        if state != self._state:
            self._recordings.clear()
            self._by_rows = None
            self._state = state

    def _weights_state(self) -> object:
        generation = getattr(self._kernels, "_generation", 0)
        versions = [weight._version for weight in self._counted]
        return generation, versions, [weight.data_ptr() for weight in self._weights]


class _Watched:
    """The functions of a library; calls from the thread that records are noted."""

    def __init__(self, functions: SimpleNamespace) -> None:
        self.calls: Calls = []
        self._functions = functions
        self._thread = threading.get_ident()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(self._functions, name)

        def call(*arguments: Any) -> Any:
            if threading.get_ident() == self._thread:
                self.calls.append((name, arguments))
            return function(*arguments)

        return call


class _OnlyKernels(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Takes empty tensors from the arena, lets views pass and refuses all other operations of torch."""

    def __init__(self, arena: Arena, rows: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._arena, self._rows = arena, rows

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else the first operation imports torch's compiler, which takes a second

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        aten = torch.ops.aten
        if func is aten.empty.memory_format:
            return self._arena.tensor(args[0], kwargs.get("dtype") or torch.get_default_dtype(), self._rows)
        if func is aten.empty_like.default:
            return self._arena.tensor(args[0].shape, kwargs.get("dtype") or args[0].dtype, self._rows)
        if func.is_view:
            return func(*args, **kwargs)
        raise Unrecordable(f"{func} works on values outside the compiled kernels")


def _write(place: CCall, functions: SimpleNamespace, name: str, arguments: tuple[Any, ...]) -> None:
    """Fill in one call: its team body if it has one, its integers and pointers, its floats."""
    function = getattr(functions, name)
    if function.restype is not None:
        raise Unrecordable(f"the kernel {name} returns a value")
    team = getattr(functions.library, f"lapis_{name}_team", None)
    place.function = ctypes.cast(team or function, c_void_p).value
    place.team = team is not None
    words, reals = [], []
    for argument, kind in zip(arguments, function.argtypes, strict=True):
        if kind is c_float:
            reals.append(struct.unpack("<d", struct.pack("<f4x", argument))[0])
        elif kind is c_double:
            reals.append(argument)
        elif kind is c_void_p and hasattr(argument, "_obj"):  # byref of a structure
            words.append(ctypes.addressof(argument._obj))
        else:
            words.append(int(argument or 0))
    if len(words) > WORDS or len(reals) > REALS:
        raise Unrecordable(f"the kernel {name} has too many arguments")
    place.word[: len(words)] = words
    place.real[: len(reals)] = reals
