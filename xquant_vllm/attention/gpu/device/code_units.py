"""Device functions: codes as subnormal FP16 numbers, two at a time; see tables/head_tables.py.

Where ``PTX`` is set, each is a few instructions on registers that hold two numbers, which the compiler does not find by
itself; else the same in Triton, which its interpreter can run.
"""

import triton
import triton.language as tl


@triton.jit
def pieces_of(units, BITS: tl.constexpr, PTX: tl.constexpr):
    """Codes of units, uint16 of any shape, as a tuple of ``16 // BITS`` pieces of that shape, FP16.

    Within a byte a code counts what its bits count there.
    """
    if BITS == 8:
        low, high = _bytes(units, PTX)
        return (low, high)
    if BITS == 4:
        if PTX:
            a, b, c, d = tl.inline_asm_elementwise(
                """{ .reg .b32 high;
                and.b32 $0, $4, 0x000F000F; and.b32 $2, $4, 0x00F000F0; shr.b32 high, $4, 8;
                and.b32 $1, high, 0x000F000F; and.b32 $3, high, 0x00F000F0; }""",
                "=&r,=&r,=&r,=&r,r",
                [units],
                (tl.float16, tl.float16, tl.float16, tl.float16),
                is_pure=True,
                pack=2,
            )
            return (a, b, c, d)
        return (_piece(units, 0, 15), _piece(units, 8, 15), _piece(units, 0, 240), _piece(units, 8, 240))
    if PTX:
        a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
            """{ .reg .b32 high;
            and.b32 $0, $8, 0x00030003; and.b32 $2, $8, 0x000C000C;
            and.b32 $4, $8, 0x00300030; and.b32 $6, $8, 0x00C000C0; shr.b32 high, $8, 8;
            and.b32 $1, high, 0x00030003; and.b32 $3, high, 0x000C000C;
            and.b32 $5, high, 0x00300030; and.b32 $7, high, 0x00C000C0; }""",
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r",
            [units],
            (tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
        return (a, b, c, d, e, f, g, h)
    return (
        _piece(units, 0, 3),
        _piece(units, 8, 3),
        _piece(units, 0, 12),
        _piece(units, 8, 12),
        _piece(units, 0, 48),
        _piece(units, 8, 48),
        _piece(units, 0, 192),
        _piece(units, 8, 192),
    )


@triton.jit
def _bytes(units, PTX: tl.constexpr):
    if PTX:
        low, high = tl.inline_asm_elementwise(
            "{ .reg .b32 high; and.b32 $0, $2, 0x00FF00FF; shr.b32 high, $2, 8; and.b32 $1, high, 0x00FF00FF; }",
            "=&r,=&r,r",
            [units],
            (tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
        return low, high
    return _piece(units, 0, 255), _piece(units, 8, 255)


@triton.jit
def _piece(units, shift: tl.constexpr, mask: tl.constexpr):
    return ((units >> shift) & mask).to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def word_from(low, high, shift, PTX: tl.constexpr):
    """The 32 bits of two uint32 that follow each other, from bit ``shift`` (0 to 31) of the first on."""
    if PTX:
        return tl.inline_asm_elementwise(
            "shf.r.wrap.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, shift], tl.uint32, is_pure=True, pack=1
        )
    return ((low.to(tl.uint64) | (high.to(tl.uint64) << 32)) >> shift.to(tl.uint64)).to(tl.uint32)


@triton.jit
def words_from(low, high, shift, PTX: tl.constexpr):
    """64 bits of two uint64 that follow each other, from bit ``shift`` (0 to 56) of the first on, as two uint32."""
    if PTX:
        first, second = tl.inline_asm_elementwise(
            """{ .reg .pred far; .reg .b32 a, b, c, d;
            mov.b64 {a, b}, $2; mov.b64 {c, d}, $3; setp.ge.u32 far, $4, 32;
            selp.b32 a, b, a, far; selp.b32 b, c, b, far; selp.b32 c, d, c, far;
            shf.r.wrap.b32 $0, a, b, $4; shf.r.wrap.b32 $1, b, c, $4; }""",
            "=&r,=&r,l,l,r",
            [low, high, shift],
            (tl.uint32, tl.uint32),
            is_pure=True,
            pack=1,
        )
        return first, second
    of_shift = shift.to(tl.uint64)
    found = (low >> of_shift) | ((high << 1) << (63 - of_shift))
    return (found & 0xFFFFFFFF).to(tl.uint32), (found >> 32).to(tl.uint32)


@triton.jit
def units_of(words, WORDS: tl.constexpr, TOKENS: tl.constexpr):
    """``[TOKENS, WORDS]`` uint32 as ``[TOKENS, 2 * WORDS]`` uint16, in the order of their bytes."""
    first, second = (words & 0xFFFF).to(tl.uint16), (words >> 16).to(tl.uint16)
    return tl.reshape(tl.join(first, second), [TOKENS, 2 * WORDS])


@triton.jit
def turned(low, high, cos, sin, PTX: tl.constexpr):
    """Both halves of keys, FP16, turned by angles; all of one shape."""
    if PTX:
        first, second = tl.inline_asm_elementwise(
            """{ .reg .b32 of_high, of_low;
            mul.rn.f16x2 of_high, $3, $5; neg.f16x2 of_high, of_high; fma.rn.f16x2 $0, $2, $4, of_high;
            mul.rn.f16x2 of_low, $2, $5; fma.rn.f16x2 $1, $3, $4, of_low; }""",
            "=&r,=&r,r,r,r,r",
            [low, high, cos, sin],
            (tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
        return first, second
    return low * cos - high * sin, high * cos + low * sin


@triton.jit
def side_by_side(pieces, UNITS: tl.constexpr, TOKENS: tl.constexpr, BITS: tl.constexpr):
    """Pieces ``[TOKENS, UNITS]``, one after another: ``[TOKENS, UNITS * (16 // BITS)]``."""
    if BITS == 8:
        x = tl.permute(tl.join(pieces[0], pieces[1]), (0, 2, 1))
    elif BITS == 4:
        x = tl.join(tl.join(pieces[0], pieces[1]), tl.join(pieces[2], pieces[3]))
        x = tl.permute(x, (0, 3, 2, 1))
    else:
        low = tl.join(tl.join(pieces[0], pieces[1]), tl.join(pieces[2], pieces[3]))
        high = tl.join(tl.join(pieces[4], pieces[5]), tl.join(pieces[6], pieces[7]))
        x = tl.permute(tl.join(low, high), (0, 4, 3, 2, 1))
    return tl.reshape(x, [TOKENS, UNITS * (16 // BITS)])


@triton.jit
def channels_of(UNITS: tl.constexpr, ROW_BYTES: tl.constexpr, BITS: tl.constexpr):
    """Of the columns of ``side_by_side`` which channels they are, and by what their numbers become codes.

    Returns:
        int32 ``[UNITS * (16 // BITS)]``, -1 where there is none, and FP32 of that shape.
    """
    column = tl.arange(0, UNITS * (16 // BITS))
    piece, unit = column // UNITS, column % UNITS
    channel = tl.where(2 * unit < ROW_BYTES, piece // 2 * ROW_BYTES + 2 * unit + piece % 2, -1)
    return channel, 16777216.0 / (1 << (piece // 2 * BITS)).to(tl.float32)
