"""Integer codes <-> bytes, at any width from 2 to 16 bits.

The stream is little-endian throughout: code i is a two's complement number in bits [i*b, (i+1)*b) of the stream,
and bit k of the stream is bit k % 8 of byte k // 8. So 8-bit codes are plain int8, 16-bit codes plain little-endian
int16, and of two 4-bit codes the first lies in the low half of the byte. The last byte is filled up with zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_geta.config_checks import MAX_BITS, MIN_BITS


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
    _check_bits(bits)
    if packed.dtype != torch.uint8 or packed.shape != (packed_bytes(numel, bits),):
        raise ValueError(
            f"{numel} codes of {bits} bits are uint8 of shape ({packed_bytes(numel, bits)},), "
            f"not {str(packed.dtype).removeprefix('torch.')} of shape {tuple(packed.shape)}."
        )
    octets = packed.new_zeros(-(-numel // 8) * bits)
    octets[: len(packed)] = packed
    octets = octets.view(-1, bits)  # (octets, bits) bytes
    codes = torch.empty(len(octets), 8, dtype=torch.int32, device=packed.device)
    sign = 1 << bits - 1
    for k in range(8):
        first_byte, shift = divmod(k * bits, 8)
        field = torch.zeros(len(octets), dtype=torch.int32, device=packed.device)
        for i in range(packed_bytes(1, shift + bits)):
            field |= octets[:, first_byte + i].to(torch.int32) << 8 * i
        codes[:, k] = ((field >> shift & (1 << bits) - 1) ^ sign) - sign
    return codes.view(-1)[:numel]


def _check_bits(bits: int) -> None:
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"bits={bits}: codes have {MIN_BITS} to {MAX_BITS} bits.")
