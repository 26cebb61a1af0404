"""wire.checksum against RFC 1071's own words, and against a plain loop."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netstack.wire import checksum


def ones_complement_sum(data: bytes) -> int:
    """RFC 1071 4.1, as it is written there: add 16-bit words, fold the carries."""
    if len(data) % 2:
        data += b"\0"
    total = 0
    for at in range(0, len(data), 2):
        total += data[at] << 8 | data[at + 1]
        total = (total & 0xFFFF) + (total >> 16)
    return total


def test_the_example_of_rfc_1071() -> None:
    # RFC 1071 3: the words 0001 f203 f4f5 f6f7 sum up to ddf2.
    assert checksum.sum_words(bytes.fromhex("0001f203f4f5f6f7")) == 0xDDF2
    assert checksum.finish(0xDDF2) == 0x220D


@pytest.mark.parametrize(
    "length", (*range(10), 899, 900, 901, 902, 903, 904, 1023, 1024, 1025, 1460, 4097, 65535, 65536)
)
def test_sum_of_every_kind_of_length(length: int) -> None:
    data = random.Random(length).randbytes(length)
    assert checksum.sum_words(data) == ones_complement_sum(data) % 65535


@pytest.mark.parametrize("length", (0, 2, 898, 900, 902, 65534))
@pytest.mark.parametrize("byte", (0x00, 0xFF))
def test_both_zeros_are_zero(length: int, byte: int) -> None:
    assert checksum.sum_words(bytes([byte]) * length) == 0


@pytest.mark.parametrize("offset", (0, 1, 2, 3))
@pytest.mark.parametrize("length", (40, 1459))
def test_views_need_no_alignment(offset: int, length: int) -> None:
    buffer = bytearray(random.Random(offset).randbytes(offset + length + 5))
    view = memoryview(buffer)[offset : offset + length]
    assert checksum.sum_words(view) == ones_complement_sum(bytes(view)) % 65535
    assert checksum.sum_words(view.toreadonly()) == checksum.sum_words(bytes(view)) == checksum.sum_words(view)


@given(st.binary(max_size=64), st.integers(0, 32), st.integers(0, 40))
def test_sums_add_up_over_parts_of_even_length(data: bytes, cut: int, repeat: int) -> None:
    data *= repeat
    head, tail = data[: 2 * cut], data[2 * cut :]
    parts = checksum.sum_words(head) + checksum.sum_words(tail)
    assert parts % 65535 == checksum.sum_words(data) == ones_complement_sum(data) % 65535


@given(st.binary(min_size=2, max_size=80).filter(lambda data: len(data) % 2 == 0))
def test_a_receiver_accepts_what_finish_gives(data: bytes) -> None:
    field = checksum.finish(checksum.sum_words(data))
    # RFC 1071 1 (3): the sum over everything, field included, is all ones.
    assert ones_complement_sum(data + field.to_bytes(2, "big")) == 0xFFFF


def test_finish_never_says_that_there_is_no_checksum() -> None:
    # RFC 768: a transmitted zero means none, a computed zero is transmitted as all ones.
    assert checksum.finish(0) == checksum.finish(65535) == checksum.finish(7 * 65535) == 0xFFFF
    assert checksum.finish(65534) == 1
    assert all(0 < checksum.finish(total) <= 0xFFFF for total in range(0, 200_000, 7))


def test_pseudo_header_ipv4() -> None:
    src, dst = bytes((10, 0, 2, 15)), bytes((192, 168, 5, 2))
    # RFC 9293 3.1: source, destination, zero, protocol, length.
    header = src + dst + b"\0\x06" + (40).to_bytes(2, "big")
    assert checksum.pseudo_sum(src, dst, 6, 40) % 65535 == ones_complement_sum(header) % 65535


@pytest.mark.parametrize("length", (0, 8, 65535, 65536, 1 << 20))
def test_pseudo_header_ipv6(length: int) -> None:
    src, dst = bytes.fromhex("fd0000050000000000000000000000ff"), bytes.fromhex("fe80000000000000505400fffe123456")
    # RFC 8200 8.1: source, destination, length (32 bits), zero (24 bits), next header.
    header = src + dst + length.to_bytes(4, "big") + b"\0\0\0\x11"
    assert checksum.pseudo_sum(src, dst, 17, length) % 65535 == ones_complement_sum(header) % 65535
