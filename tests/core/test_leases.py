"""The lease table: who gets which address, told as the stories of guests that come and go."""

import functools
import math
import operator
import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from netstack.core.guest_names import clean_name
from netstack.core.lease import Lease, StaticLease, mirror_host
from netstack.core.lease_records import read_leases, write_leases
from netstack.core.leases import LEASE_TIME, MAX_LEASES, OFFER_TIME, QUARANTINE_TIME, LeaseTable

NETWORK = bytes((192, 168, 5, 0))
PREFIX6 = bytes.fromhex("fd00c0a800050000") + bytes(8)
GATEWAY = bytes((192, 168, 5, 2))
DNS = bytes((192, 168, 5, 3))


def mac(number: int) -> bytes:
    return b"\x52\x54\x00" + number.to_bytes(3, "big")


def address(host: int) -> bytes:
    return bytes((192, 168, 5, host))


def table(prefix_length: int = 24, **settings: object) -> LeaseTable:
    return LeaseTable(NETWORK, prefix_length, reserved=(GATEWAY, DNS), prefix6=PREFIX6, **settings)  # type: ignore[arg-type]


def join(leases: LeaseTable, number: int, now: float, **settings: object) -> Lease:
    """A guest boots: it is offered an address and takes it."""
    offer = leases.offer(mac(number), now, **{k: v for k, v in settings.items() if k != "name"})  # type: ignore[arg-type]
    assert offer is not None
    bound = leases.bind(mac(number), offer.address, now, **settings)  # type: ignore[arg-type]
    assert bound is offer
    return bound


def test_the_first_guest_is_15_in_both_families() -> None:
    lease = join(table(), 1, 0.0)
    assert lease.address == address(15)
    assert lease.address6 == bytes.fromhex("fd00c0a8000500000000000000000015")


def test_an_address_that_another_guest_uses_without_a_lease_is_passed_over() -> None:
    """RFC 2131 3.1: a server SHOULD probe before it gives an address away; who set it by hand was here first."""
    taken = {address(15): mac(9), address(17): mac(9)}
    leases = table(is_in_use=lambda at, asker: at in taken and taken[at] != asker)
    assert [join(leases, number, 0.0).host for number in range(2)] == [16, 18]
    assert join(leases, 9, 0.0).host == 15


def test_a_guest_that_claims_all_addresses_does_not_keep_others_from_theirs() -> None:
    asked = []

    def is_in_use(at: bytes, _: bytes) -> bool:
        asked.append(at)
        return True

    assert join(table(is_in_use=is_in_use), 1, 0.0).host == 15
    assert len(asked) == 64


def test_guests_get_consecutive_addresses() -> None:
    leases = table()
    assert [join(leases, number, 0.0).host for number in range(5)] == [15, 16, 17, 18, 19]


def test_a_guest_that_comes_back_gets_its_old_address() -> None:
    leases = table()
    join(leases, 1, 0.0)
    join(leases, 2, 0.0)
    assert join(leases, 1, 10.0).host == 15
    assert join(leases, 2, 50 * LEASE_TIME).host == 16
    assert join(leases, 1, 50 * LEASE_TIME).host == 15


def test_a_released_address_waits_for_its_guest() -> None:
    leases = table()
    join(leases, 1, 0.0)
    assert leases.release(mac(1), address(15), 5.0) is not None
    assert leases.live(6.0) == []
    assert join(leases, 2, 6.0).host == 16
    assert join(leases, 1, 7.0).host == 15


def test_nobody_releases_another_guests_lease() -> None:
    leases = table()
    join(leases, 1, 0.0)
    assert leases.release(mac(2), address(15), 5.0) is None
    assert leases.decline(mac(2), address(15), 5.0) is None
    assert leases.live(6.0)[0].mac == mac(1)


def test_a_requested_address_is_honoured_only_if_it_is_free() -> None:
    leases = table()
    first = leases.offer(mac(1), 0.0, requested=address(77))
    assert first is not None
    assert first.host == 77
    second = leases.offer(mac(2), 0.0, requested=address(77))
    assert second is not None
    assert second.host == 15
    for unfit in (GATEWAY, DNS, address(0), address(255), bytes((10, 0, 0, 1)), b"", bytes(16)):
        lease = leases.offer(mac(3), 0.0, requested=unfit)
        assert lease is not None
        assert lease.host == 16


def test_an_unknown_guest_may_keep_the_free_address_that_it_has() -> None:
    leases = table()
    assert leases.bind(mac(1), address(40), 0.0) is not None
    assert leases.bind(mac(2), address(40), 0.0) is None
    assert leases.bind(mac(2), GATEWAY, 0.0) is None
    assert leases.bind(mac(2), bytes((10, 0, 2, 15)), 0.0) is None


def test_a_known_guest_is_held_to_its_address() -> None:
    leases = table()
    join(leases, 1, 0.0)
    assert leases.bind(mac(1), address(16), 1.0) is None
    assert leases.bind(mac(1), address(15), 1.0) is not None


def test_an_expired_lease_is_renewed_while_nobody_else_has_it() -> None:
    leases = table()
    join(leases, 1, 0.0)
    assert leases.live(LEASE_TIME + 1.0) == []
    assert leases.bind(mac(1), address(15), LEASE_TIME + 1.0) is not None


def test_an_offer_nobody_takes_up_is_forgotten() -> None:
    leases = table()
    assert leases.offer(mac(1), 0.0) is not None
    assert leases.offer(mac(2), OFFER_TIME / 2) is not None  # 16: the offer of 15 stands
    lease = leases.offer(mac(3), OFFER_TIME + 1)
    assert lease is not None
    assert lease.host == 15
    assert leases.find_mac(mac(1)) is None


def test_firmware_and_system_with_other_identifiers_get_one_address() -> None:
    leases = table()
    assert join(leases, 1, 0.0, client_id=b"\x01" + mac(1)).host == 15
    assert join(leases, 1, 9.0, client_id=b"\xff\x12\x34\x56\x78\x00\x02").host == 15
    assert join(leases, 1, 20.0).host == 15
    assert len(leases) == 1


def test_clones_with_one_identifier_get_an_address_each() -> None:
    leases = table()
    assert join(leases, 1, 0.0, client_id=b"\xffsame").host == 15
    assert join(leases, 2, 1.0, client_id=b"\xffsame").host == 16
    assert join(leases, 1, 2.0, client_id=b"\xffsame").host == 15


def test_clones_that_boot_at_once_do_not_take_each_others_offer() -> None:
    leases = table()
    first = leases.offer(mac(1), 0.0, client_id=b"\xffsame")
    second = leases.offer(mac(2), 0.1, client_id=b"\xffsame")
    assert first is not None
    assert second is not None
    assert (first.host, second.host) == (15, 16)


def test_a_machine_with_a_new_mac_is_known_by_its_identifier() -> None:
    present = {mac(1)}
    leases = table(is_present=present.__contains__)
    join(leases, 1, 0.0, client_id=b"\xffsame")
    assert join(leases, 2, 1.0, client_id=b"\xffsame").host == 16  # the other one is still there
    leases = table(is_present=present.__contains__)
    join(leases, 1, 0.0, client_id=b"\xffsame")
    present.clear()
    lease = join(leases, 2, 1.0, client_id=b"\xffsame")
    assert (lease.host, lease.mac) == (15, mac(2))
    assert leases.find_mac(mac(1)) is None


def test_a_declined_address_is_left_alone_for_a_while() -> None:
    leases = table()
    join(leases, 1, 0.0)
    assert leases.decline(mac(1), address(15), 1.0) is not None
    assert join(leases, 1, 2.0).host == 16
    assert leases.bind(mac(2), address(15), 3.0) is None
    assert leases.bind(mac(2), address(15), 1.0 + QUARANTINE_TIME) is not None


def test_clients_that_share_a_mac_part_after_a_decline() -> None:
    leases = table()
    join(leases, 1, 0.0, client_id=b"\x00one")
    assert join(leases, 1, 1.0, client_id=b"\x00two").host == 15
    leases.decline(mac(1), address(15), 2.0)
    assert join(leases, 1, 3.0, client_id=b"\x00two").host == 16
    assert join(leases, 1, 4.0, client_id=b"\x00one").host == 17
    assert join(leases, 1, 5.0, client_id=b"\x00two").host == 16


def test_declining_everything_takes_a_quarter_of_the_pool_at_most() -> None:
    leases = table()
    for number in range(600):
        lease = leases.offer(mac(number), 1.0 + number / 100)
        assert lease is not None
        leases.decline(mac(number), lease.address, 1.0 + number / 100)
    held = [lease for lease in leases if lease.quarantined_until > 7.0]
    assert len(held) == 240 // 4
    assert join(leases, 9999, 8.0).host not in {lease.host for lease in held}


def test_an_address_may_be_declined_again_while_the_quarantine_is_full() -> None:
    leases = table()
    declined = []
    for number in range(240 // 4):
        lease = leases.offer(mac(number), 0.0)
        assert lease is not None
        declined.append(lease.address)
        leases.decline(mac(number), lease.address, 0.0)
    # The one that would have to make room is the very one.
    assert leases.decline(mac(0), declined[0], 1.0) is not None
    assert leases.find_address(declined[0]) is not None
    later = 2.0 + QUARANTINE_TIME
    assert [join(leases, number, later).host for number in (1000, 1001)] == [15, 16]


def test_a_declined_ipv6_address_is_replaced_and_ipv4_stays() -> None:
    leases = table()
    join(leases, 1, 0.0)
    lease = leases.bind6(mac(1), 0.0, duid=b"duid")
    assert lease is not None
    assert lease.address6 is not None
    old = lease.address6
    assert leases.decline(mac(1), old, 1.0) is lease
    assert lease.address6 != old
    assert lease.address6[:8] == PREFIX6[:8]
    assert leases.bind(mac(1), address(15), 2.0) is lease
    assert leases.find_address(lease.address6) is lease


def test_the_lease_that_ended_longest_ago_is_reused_first() -> None:
    leases = table(29)  # numbers 1 to 6, less the gateway and DNS: four
    assert [join(leases, number, float(number)).host for number in range(4)] == [1, 4, 5, 6]
    leases.release(mac(2), address(5), 10.0)
    leases.release(mac(0), address(1), 11.0)
    assert leases.offer(mac(9), 10.5) is not None  # 5, at once
    assert join(leases, 10, 12.0).host == 1
    assert leases.offer(mac(11), 13.0) is not None  # the offer of 5: nobody took it up
    assert {lease.mac for lease in leases.live(14.0)} == {mac(1), mac(3), mac(10)}


def test_live_leases_are_never_taken_away() -> None:
    leases = table(29)
    for number in range(4):
        join(leases, number, 0.0)
    assert leases.offer(mac(9), 1.0) is None
    assert leases.bind6(mac(9), 1.0) is None
    assert leases.offer(mac(9), LEASE_TIME + 1.0) is not None


def test_a_guest_that_invents_macs_only_uses_up_offers() -> None:
    leases = table()
    mine = join(leases, 1, 0.0)
    for number in range(5000):
        assert leases.offer(mac(1000 + number), 1.0 + number / 1000) is not None
    assert len(leases) == 240
    assert leases.find_mac(mac(1)) is mine
    assert join(leases, 2, 7.0).is_live(8.0)


def test_one_link_cannot_hold_every_address() -> None:
    leases = table()
    held = 0
    for number in range(1000):
        lease = leases.offer(mac(number), 0.0, link="greedy")
        if lease is not None and leases.bind(mac(number), lease.address, 0.0, link="greedy") is not None:
            held += 1
    assert held == 180
    assert leases.bind(mac(2000), address(250), 0.0, link="greedy") is None
    assert join(leases, 3000, 0.0, link="other").is_live(1.0)
    assert join(leases, 0, 1.0, link="greedy").host == 15  # who is known stays welcome


def test_the_table_is_bounded_in_a_large_network() -> None:
    leases = LeaseTable(bytes((10, 0, 0, 0)), 8)
    for number in range(MAX_LEASES + 500):
        assert leases.offer(mac(number), 0.0) is not None
    assert len(leases) == MAX_LEASES


@pytest.mark.parametrize("prefix_length", (30, 29, 28, 27, 16))
def test_every_network_size_gives_hosts_of_its_own(prefix_length: int) -> None:
    leases = LeaseTable(NETWORK, prefix_length, reserved=(GATEWAY,), prefix6=PREFIX6)
    hosts: set[int] = set()
    for number in range(300):
        lease = leases.offer(mac(number), 0.0)
        if lease is not None and leases.bind(mac(number), lease.address, 0.0):
            hosts.add(lease.host)
    assert 2 not in hosts
    assert 0 not in hosts
    assert max(hosts) < (1 << (32 - prefix_length)) - 1
    assert len(hosts) == min(300, {30: 1, 29: 5, 28: 13, 27: 16, 16: 300}[prefix_length])


def test_static_leases() -> None:
    leases = table(
        statics=(
            StaticLease(mac(1), address(5), name="db"),
            StaticLease(mac(2), name="web"),
            StaticLease(mac(3), address(15), address6=PREFIX6[:15] + b"\x99"),
        )
    )
    assert join(leases, 9, 0.0).host == 16  # 15 belongs to another
    assert leases.offer(mac(8), 0.0, requested=address(5)) is not None
    assert leases.find_address(address(5)) is None
    first, second, third = (join(leases, number, 0.0, name="guest-says") for number in (1, 2, 3))
    assert (first.host, first.name) == (5, "db")
    assert (second.host, second.name) == (18, "web")
    assert (third.host, third.address6, third.name) == (15, PREFIX6[:15] + b"\x99", "guest-says")
    assert leases.bind(mac(1), address(20), 0.0) is None
    assert leases.decline(mac(1), address(5), 0.0) is first
    assert join(leases, 1, 1.0).host == 5


def test_a_name_passes_to_the_next_guest_when_its_own_is_gone() -> None:
    leases = table()
    first = join(leases, 1, 0.0, name="vm")
    leases.release(mac(1), first.address, 1.0)
    second = join(leases, 2, 2.0, name="vm")
    assert (first.name, second.name) == ("", "vm")
    assert join(leases, 1, 3.0).name == ""
    assert join(leases, 1, 4.0, name="vm").name == "vm-2"


def test_a_name_from_the_settings_wins() -> None:
    leases = table()
    assert join(leases, 9, 0.0, name="db").name == "db"
    leases.set_statics([StaticLease(mac(1), name="db")])
    assert join(leases, 1, 1.0, name="other").name == "db"
    found = leases.find_name("db", 2.0)
    assert found is not None
    assert found.mac == mac(1)
    assert join(leases, 9, 3.0, name="db").name == "db-2"


def test_a_static_ipv6_address_is_nobody_elses() -> None:
    leases = table(statics=(StaticLease(mac(1), address(40), address6=PREFIX6[:15] + b"\x15"),))
    stranger = join(leases, 9, 0.0)
    assert stranger.host == 15
    assert stranger.address6 == PREFIX6[:13] + b"\x10\x00\x15"
    assert join(leases, 1, 0.0).address6 == PREFIX6[:15] + b"\x15"
    leases.set_statics([StaticLease(mac(2), address6=stranger.address6)])
    newcomer = join(leases, 2, 1.0)
    assert newcomer.address6 == PREFIX6[:13] + b"\x10\x00\x15"
    assert leases.find_mac(mac(9)) is None  # it starts over when it asks again


def test_a_name_leads_to_what_the_guest_holds() -> None:
    leases = table()
    lease = join(leases, 1, 0.0)
    assert lease.addresses(1.0) == [address(15)]
    leases.bind6(mac(1), 100.0)
    assert lease.addresses(101.0) == [address(15), lease.address6]
    assert lease.addresses(LEASE_TIME + 50.0) == [lease.address6]
    assert lease.addresses(LEASE_TIME + 150.0) == []


def test_owners() -> None:
    leases = table(statics=(StaticLease(mac(1), address(40)),))
    lease = join(leases, 9, 0.0)
    assert lease.address6 is not None
    leases.bind6(mac(9), 0.0)
    assert leases.owner_of(address(15), 1.0) == leases.owner_of(lease.address6, 1.0) == mac(9)
    assert leases.owner_of(address(15), LEASE_TIME + 1.0) is None
    assert leases.owner_of(address(40), 1.0) == mac(1)
    assert leases.owner_of(address(16), 1.0) is None
    assert leases.owner_of(PREFIX6[:15] + b"\x16", 1.0) is None


def test_new_settings_move_guests_when_they_ask_again() -> None:
    leases = table()
    join(leases, 1, 0.0)
    join(leases, 2, 0.0)
    leases.set_statics([StaticLease(mac(2), address(15))])
    assert leases.bind(mac(1), address(15), 1.0) is None
    assert leases.bind(mac(2), address(16), 1.0) is None
    assert join(leases, 2, 2.0).host == 15
    assert join(leases, 1, 2.0).host in (16, 17)


def test_an_address_that_the_settings_let_go_is_given_out_again() -> None:
    leases = table(28, statics=[StaticLease(mac(1), address(5)), StaticLease(mac(2), address(6))])
    join(leases, 1, 0.0)
    assert leases.offer(mac(2), 0.0) is not None
    leases.set_statics(())
    assert leases.bind(mac(3), address(5), 2.0 * LEASE_TIME) is not None
    given = [leases.offer(mac(number), 2.0 * LEASE_TIME) for number in range(4, 15)]
    assert 6 in {lease.host for lease in given if lease is not None}


def test_an_address_that_the_settings_keep_now_goes_to_no_stranger() -> None:
    leases = table(29)
    guests = {join(leases, number, 0.0).host: number for number in range(4)}
    leases.set_statics([StaticLease(mac(guests[1]), address(1)), StaticLease(mac(99), address(4))])
    later = 2.0 * LEASE_TIME
    offers = [leases.offer(mac(number), later) for number in range(10, 14)]
    assert {lease.host for lease in offers if lease is not None} == {5, 6}
    assert join(leases, guests[1], later).host == 1
    assert join(leases, 99, later).host == 4


def test_ipv6_alone_makes_a_record_and_ipv4_joins_it() -> None:
    leases = table()
    tentative = leases.bind6(mac(1), 0.0, duid=b"duid", commit=False)
    assert tentative is not None
    assert not tentative.is_live(1.0)
    lease = leases.bind6(mac(1), 1.0, duid=b"duid", name="Debian.lan")
    assert lease is tentative
    assert lease.is_live(2.0)
    assert join(leases, 1, 2.0) is lease
    assert lease.duid == b"duid"
    assert leases.find_name("debian", 2.0) is lease
    assert LeaseTable(NETWORK, 24).bind6(mac(1), 0.0) is None


def test_names() -> None:
    leases = table()
    first = join(leases, 1, 0.0, name="Debian.localdomain")
    second = join(leases, 2, 0.0, name="debian")
    third = join(leases, 3, 0.0, name="gateway")
    assert (first.name, second.name, third.name) == ("debian", "debian-2", "")
    assert leases.find_name("DEBIAN", 1.0) is first
    assert leases.find_name("", 1.0) is None
    assert leases.find_name("debian", LEASE_TIME + 1.0) is None
    assert join(leases, 2, 1.0, name="debian").name == "debian-2"
    assert join(leases, 1, 1.0).name == "debian"  # a renewal without a name keeps it


@pytest.mark.parametrize(
    ("raw", "clean"),
    (
        ("Debian", "debian"),
        (b"vm_1.example.org", "vm-1"),
        ("--a--", "a"),
        ("host", ""),
        ("..", ""),
        ("a" * 80, "a" * 63),
        (b"\xff\xfe", ""),
        ("caf\u00e9", "caf"),
        ("x\0y", "x"),
        ("<script>", "script"),
        ("../../etc", ""),
        ("wpad", ""),
        ("ISATAP.corp.example", ""),
    ),
)
def test_names_are_cleaned(raw: str | bytes, clean: str) -> None:
    assert clean_name(raw) == clean


@given(st.one_of(st.text(), st.binary()))
@example("\u0130" * 63)  # each of them is two characters in lower case
def test_any_name_becomes_a_label_or_nothing(raw: str | bytes) -> None:
    name = clean_name(raw)
    assert len(name) <= 63
    assert all(c in "abcdefghijklmnopqrstuvwxyz0123456789-" for c in name)
    assert not name.startswith("-")
    assert not name.endswith("-")


def test_mirrored_numbers_have_the_same_digits() -> None:
    assert f"{mirror_host(15):x}" == "15"
    assert f"{mirror_host(254):x}" == "254"


def test_events_are_told() -> None:
    seen: list[tuple[str, int]] = []
    leases = table(on_event=lambda what, lease: seen.append((what, lease.host)))
    join(leases, 1, 0.0)
    leases.bind(mac(1), address(15), 1.0)
    leases.release(mac(1), address(15), 2.0)
    assert seen == [("offered", 15), ("bound", 15), ("renewed", 15), ("released", 15)]


def test_the_version_grows_with_what_is_worth_saving() -> None:
    leases = table()
    leases.offer(mac(1), 0.0)
    assert leases.version == 0
    leases.bind(mac(1), address(15), 0.0)
    assert leases.version == 1
    leases.release(mac(1), address(15), 0.0)
    assert leases.version == 2


def test_the_end_of_a_lease_is_told_once() -> None:
    seen: list[str] = []
    leases = table(on_event=lambda what, lease: seen.append(what))
    join(leases, 1, 0.0)
    for now in (1.0, 2.0, 3.0):
        assert leases.release(mac(1), address(15), now) is not None
    assert seen == ["offered", "bound", "released"]
    assert leases.version == 2


def test_leases_survive_a_restart() -> None:
    before = table()
    join(before, 1, 1000.0, client_id=b"\xffid", name="debian")
    before.bind6(mac(1), 1010.0, duid=b"\x00\x01")
    join(before, 2, 1000.0)
    before.release(mac(2), address(16), 1020.0)
    before.offer(mac(3), 1020.0)
    data = write_leases(before, 1020.0, 1_700_000_000.0)
    assert [entry["address"] for entry in data["leases"]] == ["192.168.5.15", "192.168.5.16"]

    after = table()  # an hour later, and the monotonic clock began anew
    assert read_leases(after, data, 5.0, 1_700_003_600.0) == 0
    lease = after.find_mac(mac(1))
    assert lease is not None
    assert (lease.host, lease.name, lease.client_id, lease.duid) == (15, "debian", b"\xffid", b"\x00\x01")
    assert lease.expires_at == pytest.approx(5.0 + LEASE_TIME - 20 - 3600)
    assert lease.is_live(6.0)
    other = after.find_mac(mac(2))
    assert other is not None
    assert not other.is_live(6.0)
    assert after.offer(mac(4), 6.0) is not None
    assert join(after, 2, 7.0).host == 16


def test_a_clock_set_back_does_not_prolong_leases() -> None:
    before = table()
    join(before, 1, 0.0)
    after = table()
    read_leases(after, write_leases(before, 0.0, 2_000_000_000.0), 0.0, 1_000_000_000.0)
    assert not after.live(LEASE_TIME + 1.0)


def test_records_of_another_network_are_left_out() -> None:
    before = table()
    join(before, 1, 0.0)
    after = LeaseTable(bytes((192, 168, 6, 0)), 24)
    assert read_leases(after, write_leases(before, 0.0, 0.0), 0.0, 0.0) == 1
    assert len(after) == 0


GOOD = {
    "mac": "525400000001",
    "address": "192.168.5.15",
    "client_id": "",
    "duid": "",
    "name": "",
    "expires": 9,
    "expires6": None,
}


@pytest.mark.parametrize(
    "change",
    (
        {"mac": "52:54"},
        {"mac": 7},
        {"mac": "zz"},
        {"address": "192.168.5.2"},
        {"address": "192.168.5"},
        {"address": "fd00::1"},
        {"client_id": "f"},
        {"duid": None},
        {"name": ["x"]},
        {"expires": math.nan},
        {"expires": math.inf},
        {"expires": "soon"},
        {"expires": 10**400},
    ),
)
def test_bad_entries_are_left_out(change: dict[str, object]) -> None:
    leases = table()
    second = GOOD | {"mac": "525400000002", "address": "192.168.5.16"}
    assert read_leases(leases, {"version": 1, "leases": [GOOD | change, second, 5, {}]}, 0.0, 0.0) == 3
    assert [lease.host for lease in leases] == [16]


@pytest.mark.parametrize("data", (None, [], {}, {"version": 2, "leases": []}, {"version": 1, "leases": {}}, "x"))
def test_what_is_no_list_of_leases_is_an_error(data: object) -> None:
    with pytest.raises(ValueError, match="not a list of leases"):
        read_leases(table(), data, 0.0, 0.0)


def check_consistency(leases: LeaseTable, now: float) -> None:
    """What must hold between any two calls, of the inner tables too."""
    everyone = list(leases)
    assert len({lease.host for lease in everyone}) == len(everyone) <= 14
    assert not {lease.host for lease in everyone} & {0, 2, 3, 15}
    assert len({lease.address6 for lease in everyone}) == len(everyone)
    names = [lease.name for lease in everyone if lease.name]
    assert len(set(names)) == len(names)
    for lease in everyone:
        assert leases.find_address(lease.address) is lease
        assert lease.address6 is None or leases.find_address(lease.address6) is lease
        if lease.name and lease.is_live(now):
            assert leases.find_name(lease.name, now) is lease
    assert sorted(map(id, functools.reduce(operator.iadd, leases._by_mac.values(), []))) == sorted(map(id, everyone))
    assert set(leases._offers) | set(leases._quarantined) == {
        lease.host for lease in everyone if not lease.confirmed and not lease.static
    }
    assert not set(leases._offers) & set(leases._quarantined)
    for unconfirmed in (leases._offers, leases._quarantined):
        ends = [lease.free_at() for lease in unconfirmed.values() if lease.free_at() > now]
        assert ends == sorted(ends)
    fresh = {leases.first + bit for bit in range(20) if leases._fresh >> bit & 1}
    assert fresh == set(range(1, 15)) - {2, 3, 9} - {lease.host for lease in everyone}
    ends = [lease.free_at() for lease in everyone if lease.confirmed and not lease.static]
    assert not ends or min(ends) <= now or leases._none_ends_before <= min(ends)


@pytest.mark.parametrize("seed", range(20))
def test_no_two_guests_ever_hold_one_address(seed: int) -> None:
    """A small network, many guests, every operation at random: the indexes agree and live leases are disjoint."""
    chance = random.Random(seed)
    leases = table(28, statics=(StaticLease(mac(1), address(9)),))
    now = 0.0
    told: dict[bytes, tuple[bytes, float]] = {}  # address -> guest, until when it believes in it
    for _ in range(2000):
        now += chance.choice((0.1, 1.0, 30.0, 3600.0))
        guest = mac(chance.randrange(20))
        client_id = chance.choice((b"", b"\x01" + guest, b"\xffclone"))
        wish = address(chance.randrange(16))
        match chance.randrange(6):
            case 0:
                leases.offer(guest, now, client_id=client_id, requested=wish)
            case 1 | 2:
                found = leases.find_mac(guest)
                wish = found.address if found is not None and chance.random() < 0.8 else wish
                lease = leases.bind(guest, wish, now, client_id=client_id, name=chance.choice(("", "vm", "vm-2")))
                if lease is not None:
                    holder, until = told.get(lease.address, (guest, now))
                    assert holder == guest or until <= now
                    told[lease.address] = (guest, now + LEASE_TIME)
            case 3:
                if leases.release(guest, wish, now) is not None:
                    told.pop(wish, None)
            case 4:
                if leases.decline(guest, wish, now) is not None:
                    told.pop(wish, None)
            case 5:
                leases.bind6(guest, now, commit=chance.random() < 0.5)
        check_consistency(leases, now)
