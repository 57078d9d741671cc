"""The few machine instructions that numba does not offer: unaligned loads and stores, fences, calls through a pointer.

Every other module of the packet path is plain Python over numpy arrays. These functions exist three times:

* compiled, as LLVM instructions without a bounds check (production);
* compiled from checked array accesses, with ``NUMBA_BOUNDSCHECK=1``;
* interpreted, with ``NUMBA_DISABLE_JIT=1`` (coverage).

The choice is made at import, as numba makes its own. ``le`` loads are in machine order (both supported
architectures are little-endian), ``be`` loads are in network order.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, config, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

INTERPRETED = bool(config.DISABLE_JIT)
CHECKED = INTERPRETED or bool(config.BOUNDSCHECK)

_I64 = ir.IntType(64)


def _pointer(context, builder, array_type, array, index, pointee):
    """Address of the bytes at ``index`` items into a one-dimensional array, as a pointer to ``pointee``."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), pointee.as_pointer())


def _load(bits: int, swap: bool) -> Callable[..., Any]:
    @intrinsic
    def load(_typing, array, offset):
        def codegen(context, builder, signature, args):
            pointer = _pointer(context, builder, signature.args[0], args[0], args[1], ir.IntType(bits))
            value = builder.load(pointer)
            value.align = 1
            if swap:
                value = builder.bswap(value)
            return value if bits == 64 else builder.zext(value, _I64)

        return types.int64(array, types.int64), codegen

    return load


def _store(bits: int, swap: bool) -> Callable[..., Any]:
    @intrinsic
    def store(_typing, array, offset, value):
        def codegen(context, builder, signature, args):
            number = args[2] if bits == 64 else builder.trunc(args[2], ir.IntType(bits))
            if swap:
                number = builder.bswap(number)
            pointer = _pointer(context, builder, signature.args[0], args[0], args[1], ir.IntType(bits))
            builder.store(number, pointer).align = 1
            return context.get_dummy_value()

        return types.none(array, types.int64, types.int64), codegen

    return store


def _checked_load(size: int, big: bool) -> Callable[..., Any]:
    @njit
    def load(array, offset):
        value = np.int64(0)
        for i in range(size):
            shift = 8 * (size - 1 - i) if big else 8 * i
            value |= np.int64(array[offset + i]) << np.int64(shift)
        return value

    return load


def _checked_store(size: int, big: bool) -> Callable[..., Any]:
    @njit
    def store(array, offset, value):
        for i in range(size):
            shift = 8 * (size - 1 - i) if big else 8 * i
            array[offset + i] = (np.int64(value) >> np.int64(shift)) & np.int64(0xFF)

    return store


if CHECKED:
    le16, le32, le64 = (_checked_load(size, False) for size in (2, 4, 8))
    be16, be32 = (_checked_load(size, True) for size in (2, 4))
    put_le16, put_le32, put_le64 = (_checked_store(size, False) for size in (2, 4, 8))
    put_be16, put_be32 = (_checked_store(size, True) for size in (2, 4))
else:
    le16, le32, le64 = _load(16, False), _load(32, False), _load(64, False)
    be16, be32 = _load(16, True), _load(32, True)
    put_le16, put_le32, put_le64 = _store(16, False), _store(32, False), _store(64, False)
    put_be16, put_be32 = _store(16, True), _store(32, True)


@njit
def copy(target, at, source, start, length):
    """Copy bytes between arrays; short headers only, the payload is never copied."""
    for i in range(length):
        target[at + i] = source[start + i]


# --- shared memory -------------------------------------------------------------------------------------------------

if INTERPRETED:

    def load_acquire(array, index):
        """An array item; later reads see what was written before it was stored."""
        return int(array[index])

    def store_release(array, index, value):
        """Store an array item; whoever loads it sees all that was written before."""
        array[index] = value

    def fence():
        """Order every read and write before against every one after."""

    def release():
        """Order every write before against every write after."""

    def prefetch(address):
        """Ask for the cache line at a machine address; nothing depends on whether it comes."""

else:

    @intrinsic
    def load_acquire(_typing, array, index):
        """An array item; later reads see what was written before it was stored."""

        def codegen(context, builder, signature, args):
            item = ir.IntType(signature.args[0].dtype.bitwidth)
            pointer = _pointer(context, builder, signature.args[0], args[0], args[1], item)
            value = builder.load_atomic(pointer, "acquire", item.width // 8)
            return value if item.width == 64 else builder.zext(value, _I64)

        return types.int64(array, types.int64), codegen

    @intrinsic
    def store_release(_typing, array, index, value):
        """Store an array item; whoever loads it sees all that was written before."""

        def codegen(context, builder, signature, args):
            item = ir.IntType(signature.args[0].dtype.bitwidth)
            pointer = _pointer(context, builder, signature.args[0], args[0], args[1], item)
            number = args[2] if item.width == 64 else builder.trunc(args[2], item)
            builder.store_atomic(number, pointer, "release", item.width // 8)
            return context.get_dummy_value()

        return types.none(array, types.int64, types.int64), codegen

    def _fence(ordering: str) -> Callable[..., Any]:
        @intrinsic
        def emit(_typing):
            def codegen(context, builder, signature, args):
                builder.fence(ordering)
                return context.get_dummy_value()

            return types.none(), codegen

        return emit

    @intrinsic
    def prefetch(_typing, address):
        """Ask for the cache line at a machine address; nothing depends on whether it comes."""

        def codegen(context, builder, signature, args):
            byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
            kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
            function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
            flags = [ir.Constant(number, it) for it in (1, 3, 1)]  # to write; keep it close; data
            builder.call(function, [builder.inttoptr(args[0], byte), *flags])
            return context.get_dummy_value()

        return types.none(types.int64), codegen

    fence = _fence("seq_cst")
    release = _fence("release")


# --- calls through a pointer ---------------------------------------------------------------------------------------

if INTERPRETED:

    def _call(result: type, arity: int) -> Callable[..., Any]:
        prototype = ctypes.CFUNCTYPE(result, *[ctypes.c_int64] * arity)

        def call(address, *args):
            return int(prototype(int(address))(*(int(arg) for arg in args)))

        return call

    _call_int3, _call_int4, _call_int5 = (_call(ctypes.c_int, n) for n in (3, 4, 5))
    _call_long3 = _call(ctypes.c_int64, 3)
    _call_pointer = _call(ctypes.c_int64, 0)

    def address_of(array, index):
        """Machine address of an array item."""
        return int(array.ctypes.data + index * array.itemsize)

    def int32_at(address):
        """The C ``int`` at a machine address."""
        return ctypes.c_int.from_address(int(address)).value

    def view(address, count, dtype):
        """An array over memory that somebody else keeps alive."""
        size = int(count) * np.dtype(dtype).itemsize
        memory = (ctypes.c_char * size).from_address(int(address))
        return np.frombuffer(memory, dtype=dtype).view(np.recarray if np.dtype(dtype).names else np.ndarray)

else:

    def _invoke(builder, pointer, arguments, bits):
        """Emit the call of a C function whose arguments are passed in 64-bit registers."""
        kind = ir.FunctionType(ir.IntType(bits), [_I64] * len(arguments))
        result = builder.call(builder.inttoptr(pointer, kind.as_pointer()), arguments)
        return result if bits == 64 else builder.sext(result, _I64)

    def _signature(arity: int):
        return types.int64(*[types.int64] * (arity + 1))

    @intrinsic
    def _call_int3(_typing, address, a, b, c):
        def codegen(context, builder, signature, args):
            return _invoke(builder, args[0], args[1:], 32)

        return _signature(3), codegen

    @intrinsic
    def _call_int4(_typing, address, a, b, c, d):
        def codegen(context, builder, signature, args):
            return _invoke(builder, args[0], args[1:], 32)

        return _signature(4), codegen

    @intrinsic
    def _call_int5(_typing, address, a, b, c, d, e):
        def codegen(context, builder, signature, args):
            return _invoke(builder, args[0], args[1:], 32)

        return _signature(5), codegen

    @intrinsic
    def _call_long3(_typing, address, a, b, c):
        def codegen(context, builder, signature, args):
            return _invoke(builder, args[0], args[1:], 64)

        return _signature(3), codegen

    @intrinsic
    def _call_pointer(_typing, address):
        def codegen(context, builder, signature, args):
            return _invoke(builder, args[0], args[1:], 64)

        return _signature(0), codegen

    @intrinsic
    def address_of(_typing, array, index):
        """Machine address of an array item."""

        def codegen(context, builder, signature, args):
            data = context.make_array(signature.args[0])(context, builder, args[0]).data
            return builder.ptrtoint(builder.gep(data, [args[1]]), _I64)

        return types.int64(array, types.int64), codegen

    @intrinsic
    def int32_at(_typing, address):
        """The C ``int`` at a machine address."""

        def codegen(context, builder, signature, args):
            pointer = builder.inttoptr(args[0], cgutils.int32_t.as_pointer())
            return builder.sext(builder.load(pointer), _I64)

        return types.int64(types.int64), codegen


    @intrinsic
    def _void_pointer(_typing, address):
        def codegen(context, builder, signature, args):
            return builder.inttoptr(args[0], context.get_value_type(types.voidptr))

        return types.voidptr(types.int64), codegen

    @njit
    def view(address, count, dtype):
        """An array over memory that somebody else keeps alive."""
        return carray(_void_pointer(address), (count,), dtype)


call_int3, call_int4, call_int5 = _call_int3, _call_int4, _call_int5
call_long3, call_pointer = _call_long3, _call_pointer
