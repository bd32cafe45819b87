"""What compiled loops are written with: LLVM's vectors, and how a loop is compiled and kept.

Numba has no vectors of its own: the inner parts are written in LLVM's terms, whose vectors of any
width become whatever the machine has.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

from llvmlite import ir
from numba import cfunc, types
from numba.extending import intrinsic

FLOAT, INT16, INT32, INT64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
BYTE_POINTER = ir.IntType(8).as_pointer()
CACHE_LINE_BYTES = 64

# Sums may be reordered, but what is not a number has to stay so: the sampler looks for it.
REORDERED = ("reassoc", "contract", "nsz")

EXP2_COEFFICIENTS = (1.5403530e-4, 1.3333558e-3, 9.6181291e-3, 5.5504109e-2, 2.4022651e-1)
"""Of the Taylor series of 2 ** x from x ** 6 down to x ** 2: under 1e-7 off within half of 0."""

FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2
STORAGE = {"torch.float32": FLOAT32, "torch.bfloat16": BFLOAT16, "torch.float16": FLOAT16}
"""What numbers are stored as, by the name of torch's type."""

ELEMENT_BYTES = {FLOAT32: 4, BFLOAT16: 2, FLOAT16: 2}


def vector(element: Any, width: int) -> Any:
    return ir.VectorType(element, width)


def constant(value: float, width: int) -> Any:
    return ir.Constant(vector(FLOAT, width), [value] * width)


def integers(value: int, width: int) -> Any:
    return ir.Constant(vector(INT32, width), [value] * width)


def splat(builder: Any, scalar: Any, width: int) -> Any:
    """The same number in every place of a vector."""
    anything = ir.Constant(vector(scalar.type, width), ir.Undefined)
    first = builder.insert_element(anything, scalar, INT32(0))
    return builder.shuffle_vector(first, anything, integers(0, width))


def times_plus(builder: Any, left: Any, right: Any, sum_so_far: Any) -> Any:
    product = builder.fmul(left, right, flags=REORDERED)
    return builder.fadd(product, sum_so_far, flags=REORDERED)


def float_pointer(builder: Any, address: Any, index: Any) -> Any:
    return builder.gep(builder.inttoptr(address, FLOAT.as_pointer()), [index])


def load_row(builder: Any, address: Any, row: Any, width: int, storage: int) -> Any:
    """Row `row` of a table of rows of `width` stored numbers, as float32."""
    size = INT64(width * ELEMENT_BYTES[storage])
    place = builder.inttoptr(builder.add(address, builder.mul(row, size)), BYTE_POINTER)
    if storage == FLOAT32:
        return builder.load(builder.bitcast(place, vector(FLOAT, width).as_pointer()), align=4)
    if storage == FLOAT16:
        halves = vector(ir.HalfType(), width)
        return builder.fpext(
            builder.load(builder.bitcast(place, halves.as_pointer()), align=2),
            vector(FLOAT, width),
        )
    # bfloat16 is the upper half of a float32
    bits = builder.load(builder.bitcast(place, vector(INT16, width).as_pointer()), align=2)
    wide = builder.shl(builder.zext(bits, vector(INT32, width)), integers(16, width))
    return builder.bitcast(wide, vector(FLOAT, width))


def store_row(builder: Any, values: Any, address: Any, row: Any, width: int, storage: int) -> None:
    """The counterpart of `load_row`: rounds to the nearest, to even where two are as near."""
    size = INT64(width * ELEMENT_BYTES[storage])
    place = builder.inttoptr(builder.add(address, builder.mul(row, size)), BYTE_POINTER)
    if storage == FLOAT32:
        builder.store(values, builder.bitcast(place, values.type.as_pointer()), align=4)
        return
    if storage == FLOAT16:
        halves = builder.fptrunc(values, vector(ir.HalfType(), width))
        builder.store(halves, builder.bitcast(place, halves.type.as_pointer()), align=2)
        return
    bits = builder.bitcast(values, vector(INT32, width))
    upper = builder.lshr(bits, integers(16, width))
    is_odd = builder.and_(upper, integers(1, width))
    rounded = builder.add(bits, builder.add(is_odd, integers(0x7FFF, width)))
    rounded = builder.lshr(rounded, integers(16, width))
    # Rounding could carry the bits of what is not a number into a number.
    is_number = builder.fcmp_ordered("==", values, values)
    rounded = builder.select(is_number, rounded, integers(0x7FC0, width))
    shorts = builder.trunc(rounded, vector(INT16, width))
    builder.store(shorts, builder.bitcast(place, shorts.type.as_pointer()), align=2)


def prefetch(builder: Any, address: Any, num_bytes: int, *, level: Literal[1, 2]) -> None:
    """Calls the lines from an address on into the nearest cache, or the second."""
    arguments = [BYTE_POINTER, INT32, INT32, INT32]
    call_line = builder.module.declare_intrinsic(
        "llvm.prefetch", [BYTE_POINTER], ir.FunctionType(ir.VoidType(), arguments)
    )
    to_read, locality, data = INT32(0), INT32(4 - level), INT32(1)
    for offset in range(0, num_bytes, CACHE_LINE_BYTES):
        line = builder.inttoptr(builder.add(address, INT64(offset)), BYTE_POINTER)
        builder.call(call_line, [line, to_read, locality, data])


def exp(builder: Any, exponents: Any, width: int) -> Any:
    """e to the power of numbers <= 0, about 1e-7 off; what is not a number stays so."""
    powers = builder.fmul(exponents, constant(math.log2(math.e), width))
    least = constant(-125.0, width)
    powers = builder.select(builder.fcmp_ordered("<", powers, least), least, powers)
    # Added to this, a number is rounded to an integer, which its lowest bits then hold.
    rounder = constant(1.5 * 2.0**23, width)
    rounded = builder.fadd(powers, rounder)
    rest = builder.fsub(powers, builder.fsub(rounded, rounder))
    series = constant(EXP2_COEFFICIENTS[0], width)
    for coefficient in (*EXP2_COEFFICIENTS[1:], math.log(2), 1.0):
        series = times_plus(builder, series, rest, constant(coefficient, width))
    bits = builder.shl(builder.bitcast(rounded, vector(INT32, width)), integers(23, width))
    scale = builder.bitcast(builder.add(bits, integers(127 << 23, width)), vector(FLOAT, width))
    return builder.fmul(series, scale)


def silu(builder: Any, values: Any, width: int) -> Any:
    """x / (1 + exp(-x)), and for negative x as x * exp(x) / (1 + exp(x)): never overflows."""
    ones = constant(1.0, width)
    is_positive = builder.fcmp_ordered(">=", values, constant(0.0, width))
    powers = exp(builder, builder.select(is_positive, builder.fneg(values), values), width)
    shares = builder.select(is_positive, ones, powers)
    return builder.fmul(values, builder.fdiv(shares, builder.fadd(ones, powers)))


def total_of(builder: Any, values: Any, width: int) -> Any:
    """The sum of a vector's numbers."""
    kind = ir.FunctionType(FLOAT, [FLOAT, values.type])
    add_up = builder.module.declare_intrinsic(f"llvm.vector.reduce.fadd.v{width}f32", (), kind)
    return builder.call(add_up, [FLOAT(0.0), values], fastmath=REORDERED)


def greatest_of(builder: Any, values: Any, width: int) -> Any:
    """The greatest of a vector's numbers; where one is no number, perhaps that.

    LLVM has a reduction for it, which minds what is no number, and so takes one after another.
    """
    while width > 1:
        half = (width + 1) // 2
        # Of an odd number, the one in the middle is in both: it is no greater for that.
        lanes = (range(half), range(width - half, width))
        halves = [
            builder.shuffle_vector(values, values, ir.Constant(vector(INT32, half), list(each)))
            for each in lanes
        ]
        width = half
        is_greater = builder.fcmp_ordered(">", *halves)
        values = builder.select(is_greater, *halves)
    return builder.extract_element(values, INT32(0))


@intrinsic(prefer_literal=True)
def fetch_add(typing_context: Any, address: Any) -> Any:
    """One more at an address that all threads share; what was there before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = builder.inttoptr(arguments[0], INT64.as_pointer())
        return builder.atomic_rmw("add", place, INT64(1), "monotonic")

    return types.int64(types.int64), generate


@intrinsic
def pointer(typing_context: Any, address: Any) -> Any:
    """An address as what `carray` takes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], BYTE_POINTER)

    return types.voidptr(types.int64), generate


@intrinsic(prefer_literal=True)
def stack_room(typing_context: Any, num_bytes: Any) -> Any:
    """The address of so many bytes, of any content, that are there until the function returns.

    An array would not do: numba frees one after its last use by name, whoever has its address.
    """
    size = num_bytes.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        with builder.goto_entry_block():
            room = builder.alloca(ir.ArrayType(ir.IntType(8), size))
            room.align = CACHE_LINE_BYTES
        return builder.ptrtoint(room, INT64)

    return types.int64(types.literal(size)), generate


def own_function(module: Any, name: str, *, num_arguments: int) -> tuple[Any, Any | None]:
    """The module's own function of integers that has this name, and what builds it.

    None where it has been built already. Not inlined: it is compiled once for all its calls.
    """
    if name in module.globals:
        return module.globals[name], None
    kind = ir.FunctionType(ir.VoidType(), [INT64] * num_arguments)
    function = ir.Function(module, kind, name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    return function, ir.IRBuilder(function.append_basic_block("entry"))


def compiled(function: Callable[[Any], None]) -> Any:
    """For a function of one address: its machine code, made now or by an earlier process.

    It is kept beside its file, or in the user's cache folder. Numba makes it anew where that file
    has changed and looks at no other, so that the name it is kept under stands for all of them.
    Dividing by zero raises nothing, as in NumPy: whoever calls it could not see the error.
    """
    function.__qualname__ = f"{function.__name__}_{_source_digest()}"
    signature = types.void(types.voidptr)
    try:
        return cfunc(signature, cache=True, error_model="numpy")(function)
    except (RuntimeError, OSError):
        # There is nowhere to keep it: no folder can be written to, or the disk is full.
        return cfunc(signature, error_model="numpy")(function)


@cache
def _source_digest() -> str:
    folder = Path(__file__).parent
    sources = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    return hashlib.sha256(sources).hexdigest()[:16]
