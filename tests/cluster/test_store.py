"""What is kept on disk, and what becomes of it when the disk, the process or the node changes."""

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

import pytest

from appliance.cluster.checks import Subnetwork
from appliance.cluster.messages import SubnetworkResult, parse_results
from appliance.cluster.store import TABLES, Kept, Store, write
from tests.cluster import wire

RESULTS = parse_results(b"[" + wire.answer(wire.instance(), wire.instance(1, namespace_ip_v6=None)) + b"]", "test")
SUBNETS = Subnetwork(IPv4Network("10.18.0.64/26"), IPv6Network("fc00::1:0/112"))


def silent(complaint: str) -> None:
    raise AssertionError(complaint)


def test_what_was_saved_is_found_with_its_age(tmp_path: Path) -> None:
    now = 1000.0
    store = Store(tmp_path / "new" / "directory", wire.NODE, lambda: now)
    store.save_tables(RESULTS)
    store.save_subnetwork(SUBNETS)
    now = 1100.0
    assert store.load(silent) == Kept(
        tuple(RESULTS), 100.0, SubnetworkResult(address="10.18.0.64", addressv6="fc00::1:0", prefix=26, prefixv6=112)
    )


def test_a_clock_that_was_set_back_makes_nothing_younger_than_now(tmp_path: Path) -> None:
    Store(tmp_path, wire.NODE, lambda: 1000.0).save_tables(RESULTS)
    assert Store(tmp_path, wire.NODE, lambda: 5.0).load(silent).age == 0


def test_nothing_saved_is_nothing_found(tmp_path: Path) -> None:
    assert Store(tmp_path, wire.NODE).load(silent) == Kept()


def test_what_is_another_nodes_is_not_read(tmp_path: Path) -> None:
    Store(tmp_path, wire.NODE).save_tables(RESULTS)
    Store(tmp_path, wire.NODE).save_subnetwork(SUBNETS)
    assert Store(tmp_path, "65f0000000000000000000ff").load(silent) == Kept()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"node":1}', b"\xff", b'{"node":"x","saved_at":0,"results":[{}]}']
)
def test_a_file_that_cannot_be_read_is_reported_and_as_good_as_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / TABLES).write_bytes(content)
    complaints: list[str] = []
    assert Store(tmp_path, wire.NODE).load(complaints.append) == Kept()
    assert len(complaints) == 1
    assert complaints[0].startswith(f"{tmp_path / TABLES}: expected what was saved there: ")


def test_one_family_is_kept_as_one(tmp_path: Path) -> None:
    store = Store(tmp_path, wire.NODE)
    store.save_subnetwork(Subnetwork(None, SUBNETS.v6))
    kept = store.load(silent).subnetwork
    assert kept is not None
    assert (kept.v4, str(kept.v6)) == (None, "fc00::1:0")


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """No file may grow beyond a size: writing ends in the middle, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write(path, b"old")
    with full_disk(1000), pytest.raises(OSError, match="File too large"):
        write(path, b"new" * 1000)
    assert path.read_bytes() == b"old"
    write(path, b"newer")
    assert path.read_bytes() == b"newer"


def test_a_process_that_dies_while_it_writes_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write(path, b"old")
    (tmp_path / "file.new").write_bytes(b"half of what was to b")
    assert path.read_bytes() == b"old"
    write(path, b"new")
    assert sorted(tmp_path.iterdir()) == [path]
