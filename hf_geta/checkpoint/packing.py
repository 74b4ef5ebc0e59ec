"""Integer codes <-> bytes, at any width from 2 to 16 bits.

The stream is little-endian throughout: code i is a two's complement number in bits [i*b, (i+1)*b) of the stream,
and bit k of the stream is bit k % 8 of byte k // 8. So 8-bit codes are plain int8, 16-bit codes plain little-endian
int16, and of two 4-bit codes the first lies in the low half of the byte. The last byte is filled up with zeros.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_geta.config_checks import MAX_BITS, MIN_BITS

MULTIPLIER_BITS = 4
BLOCK_NUMEL = 1 << 18  # codes that are unpacked at a time: what lies between stays in the cache


def packed_bytes(numel: int, bits: int) -> int:
    """ceil(numel * bits / 8): the bytes that `numel` codes of `bits` bits fill."""
    return -(-numel * bits // 8)


def highest_code(bits: int, signed: bool = True) -> int:
    """2^(bits-1) - 1, whose negative is the lowest code; on an unsigned grid 2^bits - 1, and 0 is the lowest."""
    return (1 << bits - signed) - 1


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """The codes as one stream of `bits` bits each.

    Args:
        codes: integers, read in row-major order, each in [-2^(bits-1), 2^(bits-1) - 1].
        bits: width of one code, 2 to 16.

    Returns:
        uint8, shape (ceil(numel * bits / 8),), on the device of `codes`.

    Raises:
        ValueError: for a width outside 2..16 or a code that does not fit in it.
    """
    _check_bits(bits)
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    if codes.numel() and (codes.min() < low or codes.max() > high):
        span = f"{int(codes.min())} to {int(codes.max())}"
        raise ValueError(f"codes from {span} do not fit in {bits} bits, which hold {low} to {high}.")
    # Eight codes fill exactly `bits` bytes, whatever the width.
    octets = codes.new_zeros(-(-codes.numel() // 8) * 8, dtype=torch.int32)
    octets[: codes.numel()] = codes.reshape(-1)
    octets = octets.view(-1, 8) & (1 << bits) - 1  # (octets, 8)
    packed = torch.zeros(len(octets), bits, dtype=torch.uint8, device=codes.device)
    for k in range(8):
        first_byte, shift = divmod(k * bits, 8)
        field = octets[:, k] << shift  # at most 16 + 7 bits
        for byte in range(first_byte, first_byte + packed_bytes(1, shift + bits)):
            packed[:, byte] |= (field & 0xFF).to(torch.uint8)
            field = field >> 8
    return packed.view(-1)[: packed_bytes(codes.numel(), bits)].clone()


def unpack_codes(packed: Tensor, bits: int, numel: int) -> Tensor:
    """The first `numel` codes of a stream that `pack_codes` wrote.

    Args:
        packed: uint8, shape (ceil(numel * bits / 8),).
        bits: width of one code, 2 to 16.
        numel: how many codes the stream holds.

    Returns:
        int32, shape (numel,), on the device of `packed`.

    Raises:
        ValueError: for a width outside 2..16, or where `packed` does not hold `numel` codes.
    """
    return unpack_narrow(packed, bits, numel).to(torch.int32)


def unpack_narrow(packed: Tensor, bits: int, numel: int) -> Tensor:
    """`unpack_codes` in the smallest type, int8 up to 8 bits, else int16; codes of 8 bits are a view of `packed`."""
    _check_bits(bits)
    if packed.dtype != torch.uint8 or packed.shape != (packed_bytes(numel, bits),):
        raise ValueError(
            f"{numel} codes of {bits} bits are uint8 of shape ({packed_bytes(numel, bits)},), "
            f"not {str(packed.dtype).removeprefix('torch.')} of shape {tuple(packed.shape)}."
        )
    if bits == 8:
        return packed.view(torch.int8)
    octets = -(-numel // 8)  # eight codes fill exactly `bits` bytes, whatever the width
    codes = torch.empty(8 * octets, dtype=torch.int8 if bits < 8 else torch.int16, device=packed.device)
    step = BLOCK_NUMEL if packed.device.type == "cpu" else max(8 * octets, 1)
    for start in range(0, 8 * octets, step):
        block = codes[start : start + step]
        piece = packed[start * bits // 8 :][: len(block) * bits // 8]
        piece = torch.nn.functional.pad(piece, (0, len(block) * bits // 8 - len(piece)))
        (_spread_ if bits < 8 else _gather_)(piece, bits, block)
    return codes[:numel]


def unpack_rows(packed: Tensor, bits: int, width: int, rows: Tensor) -> Tensor:
    """The codes of chosen rows of a matrix that `pack_codes` wrote, without looking at the others.

    Args:
        packed: uint8, the stream of the whole matrix, (ceil(entries * width * bits / 8),).
        bits: width of one code, 2 to 16.
        width: codes in a row.
        rows: int64, (rows,), each in [0, entries).

    Returns:
        int32, (rows, width), on the device of `packed`.
    """
    if width % 8 == 0:  # a row is whole octets of codes
        found = packed.view(-1, width // 8 * bits).index_select(0, rows)
        return unpack_codes(found.view(-1), bits, len(rows) * width).view(len(rows), width)
    first, octets = rows[:, None] * width, width // 8 + 2  # as many octets as a row may reach into
    place = (first // 8 + torch.arange(octets, device=rows.device))[..., None] * bits
    place = place + torch.arange(bits, device=rows.device)  # (rows, octets, bits)
    found = packed[place.clamp_(max=len(packed) - 1)]  # past the end lies no code
    codes = unpack_codes(found.view(-1), bits, len(rows) * octets * 8).view(len(rows), octets * 8)
    return codes.gather(1, first % 8 + torch.arange(width, device=rows.device))


def pack_multipliers(multipliers: Tensor) -> Tensor:
    """Multipliers, integers of 1 to 16, as a stream of numbers m - 1 without sign, 4 bits each."""
    return pack_codes(((multipliers.to(torch.int32) - 1) ^ 8) - 8, MULTIPLIER_BITS)


def unpack_multipliers(packed: Tensor, numel: int) -> Tensor:
    """The `numel` multipliers, int8, of a stream that `pack_multipliers` wrote."""
    return (unpack_narrow(packed, MULTIPLIER_BITS, numel) & 0xF) + 1


def _spread_(packed: Tensor, bits: int, codes: Tensor) -> None:
    """Fill `codes`, int8, a multiple of 8 of them: every code moves into a byte of its own, many in one word.

    The fewest codes that fill whole bytes (2 of 4 bits, 4 of 6, 8 of 5) come into the low bits of a word with a byte
    for each. Then its upper half moves up to the middle, then the upper half of each half, until all are apart.
    """
    together = 8 // math.gcd(bits, 8)
    size = together * bits // 8
    word_type = {2: torch.int16, 4: torch.int32, 8: torch.int64}[together]
    if size == 1:
        words = packed.to(word_type)
    else:
        words = packed.new_zeros(len(packed) // size, together)
        words[:, :size] = packed.view(-1, size)
        words = words.view(word_type).view(-1)
    half = together // 2
    while half:
        lower = sum((1 << half * bits) - 1 << slot for slot in range(0, 8 * together, 16 * half))
        upper = words & _signed(lower << half * bits, 8 * together)
        words = (words & lower).bitwise_or_(upper.bitwise_left_shift_(half * (8 - bits)))
        half //= 2
    sign = 1 << bits - 1
    torch.sub(words.view(torch.int8).bitwise_xor_(sign), sign, out=codes)


def _gather_(packed: Tensor, bits: int, codes: Tensor) -> None:
    """Fill `codes`, int16, a multiple of 8 of them: each is cut out of its two or three bytes."""
    octets = packed.view(-1, bits).to(torch.int32)  # (octets, bits)
    for k in range(8):
        first_byte, shift = divmod(k * bits, 8)
        field = octets[:, first_byte] >> shift
        for i in range(1, packed_bytes(1, shift + bits)):
            field |= octets[:, first_byte + i] << 8 * i - shift
        sign = 1 << bits - 1
        codes.view(-1, 8)[:, k] = ((field & (1 << bits) - 1) ^ sign) - sign


def _signed(word: int, bits: int) -> int:
    """The two's complement number with the bits of `word`."""
    return word - (1 << bits) if word >> bits - 1 else word


def _check_bits(bits: int) -> None:
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"bits={bits}: codes have {MIN_BITS} to {MAX_BITS} bits.")
