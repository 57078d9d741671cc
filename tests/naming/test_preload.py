"""A resolver may not be able to read where it is installed, once it is who it is to be."""

import subprocess
import sys

PROGRAM = """
import sys
from appliance.naming import process
if sys.argv[1] == "preload":
    process.preload()
sys.meta_path.clear()
import dns.asyncbackend, dns.rdata
for kind, text in ("A", "192.0.2.7"), ("AAAA", "2001:db8::7"), ("SRV", "0 0 80 web."), ("TXT", "a"), ("PTR", "web."):
    wire = dns.rdata.from_text("IN", kind, text).to_wire()
    print(kind, dns.rdata.from_wire("IN", kind, wire, 0, len(wire)))
print(dns.asyncbackend.get_backend("asyncio").name())
"""
TEXTS = ["A 192.0.2.7", "AAAA 2001:db8::7", "SRV 0 0 80 web.", 'TXT "a"', "PTR web.", "asyncio"]


def records(how: str) -> list[str]:
    """Records of each type, read where nothing can be imported."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=False)
    return done.stdout.splitlines()


def test_records_mean_something_where_nothing_can_be_imported_any_more() -> None:
    assert records("preload") == TEXTS
    assert records("late") != TEXTS, "otherwise this shows nothing"
