import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_geta.checkpoint import packing
from hf_geta.checkpoint.packing import (
    pack_codes,
    pack_multipliers,
    packed_bytes,
    unpack_codes,
    unpack_multipliers,
    unpack_narrow,
)

WIDTHS = range(2, 17)


@given(bits=st.integers(2, 16), numel=st.integers(0, 70), seed=st.integers(0, 2**31))
@settings(max_examples=300, deadline=None)
def test_unpacking_inverts_packing(bits, numel, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (numel,), generator=generator, dtype=torch.int32)
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (packed_bytes(numel, bits),)
    assert torch.equal(unpack_codes(packed, bits, numel), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_streams_of_many_blocks_unpack_to_the_same_codes_of_the_smallest_type(bits, monkeypatch):
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (77,), generator=torch.Generator().manual_seed(bits))
    packed = pack_codes(codes, bits)
    monkeypatch.setattr(packing, "BLOCK_NUMEL", 16)
    unpacked = unpack_narrow(packed, bits, 77)
    assert unpacked.dtype == (torch.int8 if bits <= 8 else torch.int16)
    assert torch.equal(unpacked.long(), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_code_of_a_width_survives(bits):
    codes = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=torch.int32)
    assert torch.equal(unpack_codes(pack_codes(codes, bits), bits, len(codes)), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_stream_is_the_two_s_complement_codes_in_one_little_endian_number(bits):
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (21,), generator=torch.Generator().manual_seed(bits))
    number = sum((code % 2**bits) << bits * i for i, code in enumerate(codes.tolist()))
    assert bytes(pack_codes(codes, bits).tolist()) == number.to_bytes(packed_bytes(21, bits), "little")


@pytest.mark.parametrize(
    ("bits", "codes", "stream"),
    [
        (2, [1, -1, 0, 1, -1], "4d 03"),  # 01 11 00 01 | 11, first code lowest
        (3, [3, -3, 1], "6b 00"),  # 011 101 001
        (4, [1, -1, 7], "f1 07"),
        (5, [15, -15, 1], "2f 06"),
        (8, [1, -1, 127, -127], "01 ff 7f 81"),
        (12, [1, -1, 2047], "01 f0 ff ff 07"),
        (16, [1, -2, 32767], "01 00 fe ff ff 7f"),
    ],
)
def test_the_format_is_these_bytes(bits, codes, stream):
    assert bytes(pack_codes(torch.tensor(codes), bits).tolist()) == bytes.fromhex(stream)
    packed = torch.tensor(list(bytes.fromhex(stream)), dtype=torch.uint8)
    assert unpack_codes(packed, bits, len(codes)).tolist() == codes


def test_packing_reads_a_matrix_in_row_major_order_and_keeps_no_view_of_it():
    codes = torch.tensor([[1, 2], [3, 4]], dtype=torch.int8).t()
    packed = pack_codes(codes, 8)
    assert packed.tolist() == [1, 3, 2, 4]
    assert packed.untyped_storage().nbytes() == 4


@pytest.mark.parametrize(("bits", "code"), [(2, 2), (4, 8), (4, -9), (16, 32768)])
def test_a_code_that_does_not_fit_is_refused(bits, code):
    with pytest.raises(ValueError, match=f"do not fit in {bits} bits"):
        pack_codes(torch.tensor([0, code]), bits)


@pytest.mark.parametrize("bits", [1, 17])
def test_widths_outside_2_to_16_are_refused(bits):
    with pytest.raises(ValueError, match="2 to 16 bits"):
        pack_codes(torch.tensor([0]), bits)
    with pytest.raises(ValueError, match="2 to 16 bits"):
        unpack_codes(torch.zeros(1, dtype=torch.uint8), bits, 1)


def test_a_stream_of_the_wrong_length_or_type_is_refused():
    with pytest.raises(ValueError, match=r"3 codes of 4 bits are uint8 of shape \(2,\), not uint8 of shape \(3,\)"):
        unpack_codes(torch.zeros(3, dtype=torch.uint8), 4, 3)
    with pytest.raises(ValueError, match="not float32"):
        unpack_codes(torch.zeros(2), 4, 3)


def test_two_multipliers_are_a_byte_and_one_less_each():
    multipliers = torch.tensor([1, 16, 8, 9, 2], dtype=torch.uint8)
    packed = pack_multipliers(multipliers)
    assert packed.tolist() == [0xF0, 0x87, 0x01]
    assert unpack_multipliers(packed, 5).tolist() == multipliers.tolist()
    assert unpack_multipliers(packed, 5).dtype == torch.int8
