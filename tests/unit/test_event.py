"""Slots and identifiers."""

from __future__ import annotations

import binascii

from hypothesis import given
from hypothesis import strategies as st

from eventstore.event import SLOTS, aggregate_id_problem, event_id_problem, new_event_id, slot_of


@given(st.text(min_size=1, max_size=100))
def test_a_slot_is_the_crc32_of_the_id_modulo_1024(aggregate_id: str) -> None:
    assert slot_of(aggregate_id) == binascii.crc32(aggregate_id.encode()) % SLOTS


def test_slots_are_spread() -> None:
    used = {slot_of(f"case-{number}") for number in range(20_000)}
    assert len(used) == SLOTS


def test_slots_never_change() -> None:
    # crc32 of "123456789" is the check value of CRC-32/ISO-HDLC: 0xCBF43926.
    assert slot_of("123456789") == 0xCBF43926 % 1024


def test_new_event_ids_are_ordered() -> None:
    made = [new_event_id() for _ in range(1_000)]
    assert made == sorted(made)
    assert len(set(made)) == 1_000


def test_what_is_wrong_with_an_aggregate_id() -> None:
    assert aggregate_id_problem("a" * 512) is None
    assert aggregate_id_problem("é" * 256) is None
    assert aggregate_id_problem("") == "must not be empty"
    assert "512 bytes" in str(aggregate_id_problem("é" * 257))
    assert "NUL" in str(aggregate_id_problem("a\0b"))
    assert "surrogate" in str(aggregate_id_problem("a\ud800"))


def test_what_is_wrong_with_an_event_id() -> None:
    assert event_id_problem("x" * 128) is None
    assert "128" in str(event_id_problem("x" * 129))
    assert "128" in str(event_id_problem(""))
    assert "NUL" in str(event_id_problem("\0"))
    assert "surrogate" in str(event_id_problem("\udfff"))
