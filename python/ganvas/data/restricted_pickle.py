"""Reading the pickled dicts of published data sets without running what a pickle may contain.

A pickle names functions and calls them, so reading one runs code of its author's choice. This unpickler resolves only
the names that rebuild a numpy array; dicts, lists, tuples, strings, bytes and numbers need no names. Everything else is
refused before it is called. The names do not lead to numpy either: numpy trusts what it is given (a forged dtype turns
the bytes of an array into object pointers), so stand-ins check the parts of an array of bytes and build it from them.
"""

from __future__ import annotations

import math
import pickle
from typing import Any, BinaryIO

import numpy as np


def load_dict(file: BinaryIO) -> dict[Any, Any]:
    """Unpickle a dict whose values are uint8 arrays (read-only) and plain containers; strings of Python 2 become bytes.

    Raises pickle.UnpicklingError if the pickle asks for anything else, and whatever a damaged pickle makes the
    standard library raise.
    """
    content = ArrayUnpickler(file, encoding="bytes").load()
    if type(content) is not dict:
        raise pickle.UnpicklingError(f"the pickle holds a {type(content).__name__}, expected a dict")
    return {key: value.array if type(value) is PickledArray else value for key, value in content.items()}


class ArrayUnpickler(pickle.Unpickler):
    """An unpickler that resolves nothing but ``STAND_INS``."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return STAND_INS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"the pickle asks for {module}.{name}; only numpy arrays are admitted"
            ) from None


class PickledArray:
    """An array in a pickle: it is created empty, and its state follows."""

    array: np.ndarray

    def __setstate__(self, state: tuple[int, tuple[int, ...], Any, bool, bytes]) -> None:
        _, shape, dtype, is_fortran, content = state
        self.array = build_array(content, dtype, shape, "F" if is_fortran else "C")


class PickledByteType:
    """The dtype uint8 in a pickle. Its state holds the byte order and such, which mean nothing for single bytes."""

    def __setstate__(self, state: Any) -> None:
        pass


def build_array(content: bytes, dtype: Any, shape: tuple[int, ...], order: str) -> np.ndarray:
    """A uint8 array of parts that come from a pickle. Raises UnpicklingError if they do not fit each other."""
    if type(dtype) is not PickledByteType or type(content) not in (bytes, bytearray):
        raise pickle.UnpicklingError("the pickle holds an array of something other than bytes")
    if type(shape) is not tuple or any(type(length) is not int or length < 0 for length in shape):
        raise pickle.UnpicklingError(f"the pickle holds an array of shape {shape!r}")
    if math.prod(shape) != len(content):
        raise pickle.UnpicklingError(f"the pickle holds {len(content)} bytes for an array of shape {shape}")
    return np.frombuffer(bytes(content), dtype=np.uint8).reshape(shape, order="F" if order == "F" else "C")


def reconstruct(*_: Any) -> PickledArray:
    """numpy's ``_reconstruct(ndarray, (0,), b"b")``: an empty array, before its state."""
    return PickledArray()


def from_buffer(content: bytes, dtype: Any, shape: tuple[int, ...], order: str) -> PickledArray:
    """numpy's ``_frombuffer``, which protocol 5 calls."""
    result = PickledArray()
    result.array = build_array(content, dtype, shape, order)
    return result


def byte_type(name: str | bytes, *_: Any) -> PickledByteType:
    """numpy's ``dtype(name, align, copy)``."""
    if name not in ("u1", b"u1"):
        raise pickle.UnpicklingError(f"the pickle asks for the dtype {name!r}; only u1 (uint8) is admitted")
    return PickledByteType()


def encode_latin1(text: str, encoding: str) -> bytes:
    """What protocol 2 pickles of Python 3 call to rebuild bytes, held to the one codec they use."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"the pickle asks for the codec {encoding!r}; only latin1 is admitted")
    return text.encode("latin1")


# numpy moved its core to numpy._core in 2.0; older pickles have the old names.
STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): None,  # the argument of _reconstruct, never called
    ("numpy", "dtype"): byte_type,
    ("numpy.core.multiarray", "_reconstruct"): reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): reconstruct,
    ("numpy.core.numeric", "_frombuffer"): from_buffer,
    ("numpy._core.numeric", "_frombuffer"): from_buffer,
    ("_codecs", "encode"): encode_latin1,
}
