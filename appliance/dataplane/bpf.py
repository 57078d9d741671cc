"""A small eBPF assembler and loader: programs that look at a packet, through bpf(2).

The instruction encoding is that of the kernel's Documentation/bpf/standardization/instruction-set.rst. Arithmetic is
32-bit throughout (the upper half of a register is zeroed), as the hash that we need is.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from typing import Final

ABSOLUTE: Final = 0x20

_LD, _JMP32, _ALU = 0x00, 0x06, 0x04
_JMP: Final = 0x05
_K, _X = 0x00, 0x08
_IND: Final = 0x40
_SIZES: Final = {1: 0x10, 2: 0x08, 4: 0x00}
_ADD, _MUL, _AND, _LSH, _RSH, _MOD, _XOR, _MOV = 0x00, 0x20, 0x50, 0x60, 0x70, 0x90, 0xA0, 0xB0
_JA, _JEQ, _JNE, _EXIT = 0x00, 0x10, 0x50, 0x90

_PROG_LOAD: Final = 5
SOCKET_FILTER: Final = 1
CLASSIFIER: Final = 3
"""Types of programs (linux/bpf.h): what decides at a socket, and at a link's ingress (tc-bpf(8))."""
_SYSCALL_BPF: Final = {"x86_64": 321, "aarch64": 280}


class Assembler:
    """Collects instructions and resolves labels."""

    def __init__(self) -> None:
        self._code: list[tuple[int, int, int, str | int, int]] = []
        self._labels: dict[str, int] = {}

    def _emit(self, opcode: int, target: int = 0, source: int = 0, offset: str | int = 0, constant: int = 0) -> None:
        self._code.append((opcode, target, source, offset, constant))

    def label(self, name: str) -> None:
        """Name the next instruction."""
        self._labels[name] = len(self._code)

    def load(self, mode: int, size: int, offset: int) -> None:
        """r0 = ``size`` bytes of the packet at ``offset``, in host order; ends the program with 0 beyond the packet."""
        self._emit(_LD | mode | _SIZES[size], constant=offset)

    def load_indirect(self, size: int, register: int, offset: int) -> None:
        """r0 = ``size`` bytes of the packet at ``register + offset``."""
        self._emit(_LD | _IND | _SIZES[size], source=register, constant=offset)

    def _alu(self, operation: int, target: int, constant: int) -> None:
        self._emit(_ALU | operation | _K, target, constant=constant)

    def _alu_reg(self, operation: int, target: int, source: int) -> None:
        self._emit(_ALU | operation | _X, target, source)

    def mov(self, target: int, constant: int) -> None:
        self._alu(_MOV, target, constant)

    def mov_reg(self, target: int, source: int) -> None:
        """Copy all 64 bits: a register may hold a pointer."""
        self._emit(0x07 | _MOV | _X, target, source)

    def add_reg(self, target: int, source: int) -> None:
        self._alu_reg(_ADD, target, source)

    def xor(self, target: int, constant: int) -> None:
        self._alu(_XOR, target, constant)

    def xor_reg(self, target: int, source: int) -> None:
        self._alu_reg(_XOR, target, source)

    def and_(self, target: int, constant: int) -> None:
        self._alu(_AND, target, constant)

    def lsh(self, target: int, bits: int) -> None:
        self._alu(_LSH, target, bits)

    def rsh(self, target: int, bits: int) -> None:
        self._alu(_RSH, target, bits)

    def mul(self, target: int, constant: int) -> None:
        self._alu(_MUL, target, constant)

    def mod(self, target: int, constant: int) -> None:
        self._alu(_MOD, target, constant)

    def jump(self, label: str) -> None:
        self._emit(_JMP | _JA, offset=label)

    def jump_if_equal(self, register: int, constant: int, label: str) -> None:
        self._emit(_JMP32 | _JEQ | _K, register, offset=label, constant=constant)

    def jump_if_not_equal(self, register: int, constant: int, label: str) -> None:
        self._emit(_JMP32 | _JNE | _K, register, offset=label, constant=constant)

    def exit(self) -> None:
        """Return r0."""
        self._emit(_JMP | _EXIT)

    def assemble(self) -> bytes:
        """The program's bytes."""
        return b"".join(self._encode(at, *instruction) for at, instruction in enumerate(self._code))

    def _encode(self, at: int, opcode: int, target: int, source: int, offset: str | int, constant: int) -> bytes:
        distance = self._labels[offset] - at - 1 if isinstance(offset, str) else offset
        return struct.pack("<BBhI", opcode, source << 4 | target, distance, constant & 0xFFFFFFFF)


_ATTEMPTS = 5
"""The verifier gives up with EAGAIN when a signal is pending (kernel/bpf/verifier.c), such as a child's end."""


def load(kind: int, program: bytes, name: str) -> int:
    """Load a program; gives its descriptor. Raises OSError with the verifier's last words."""
    log = ctypes.create_string_buffer(65_536)
    code = ctypes.create_string_buffer(program, len(program))
    licence = ctypes.create_string_buffer(b"Dual MIT/GPL")
    attributes = struct.pack(
        "=IIQQIIQII16s",
        kind,
        len(program) // 8,
        ctypes.addressof(code),
        ctypes.addressof(licence),
        1,
        len(log),
        ctypes.addressof(log),
        0,
        0,
        name.encode()[:15],
    )
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    libc = ctypes.CDLL(None, use_errno=True)
    number = _SYSCALL_BPF[platform.machine()]
    for _ in range(_ATTEMPTS):
        fd = int(libc.syscall(ctypes.c_long(number), _PROG_LOAD, ctypes.byref(buffer), len(attributes)))
        if fd >= 0 or ctypes.get_errno() != errno.EAGAIN:
            break
    if fd < 0:
        code_ = ctypes.get_errno()
        words = log.value.decode(errors="replace").strip().splitlines()
        raise OSError(code_, f"bpf(PROG_LOAD): {os.strerror(code_)}: {words[-3:] if words else 'no verifier log'}")
    return fd
