"""The resolver beside dnsmasq: the same names, the same load (dnsperf), each server on one CPU, the load on another.

Answers a second as fast as they come, then latency at RATE a second. Needs root, dnsperf and dnsmasq.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from perf.study import Study, study
from tests.environment import netns
from tests.naming.driver import GATEWAYS, Driver, resolver, service

NAMES: Final = 10_000
SECONDS: Final = 10
RATE: Final = 20_000
DNSMASQ: Final = "10.18.0.5"


def _service(number: int) -> dict[str, Any]:
    policies = {"rr": [f"10.30.{number // 250}.{number % 250}", f"fdff:2000::{number:x}"]}
    return service(f"app{number % 100}.prod.web{number}.test", policies=policies, members=[[0, None, None, True]])


def _name(number: int) -> str:
    return f"web{number}.test.app{number % 100}.prod.local"


def _load(driver: Driver, server: str, questions: Path, *more: str) -> str:
    load = ["taskset", "-c", "1", "dnsperf", "-s", server, "-d", str(questions), "-l", str(SECONDS), "-c", "4"]
    done = ["ip", "netns", "exec", driver.container.name, *load, "-q", "64", *more]
    return subprocess.run(done, capture_output=True, text=True, check=True).stdout


def _summary(output: str) -> str:
    """Answers a second, and percentiles where dnsperf said how long each took."""
    latencies = sorted(float(line.split()[-1]) for line in output.splitlines() if line.startswith("> "))
    facts = {line.split(":")[0].strip(): line.split(":")[1].split()[0] for line in output.splitlines() if ": " in line}
    said = f"{float(facts['Queries per second']):,.0f} answers/s, {facts['Queries lost']} lost"
    if latencies:
        p50, p99, last = (latencies[int(len(latencies) * part)] * 1000 for part in (0.5, 0.99, 0.99999))
        said += f", p50 {p50:.2f} ms, p99 {p99:.2f} ms, slowest {last:.2f} ms"
    return said


def _both(driver: Driver, what: str, server: str, questions: Path) -> dict[str, str]:
    return {
        f"{what}, as fast as they come": _summary(_load(driver, server, questions)),
        f"{what}, {RATE:,}/s": _summary(_load(driver, server, questions, "-Q", str(RATE), "-v")),
    }


def measure() -> Study:
    """Both, one after the other."""
    facts: dict[str, str] = {}
    netns.remove_abandoned()
    with tempfile.TemporaryDirectory() as directory, netns.namespaces() as make:
        questions, hosts = Path(directory, "questions"), Path(directory, "hosts")
        questions.write_text("".join(f"{_name(it)} A\n" for it in range(NAMES)))
        hosts.write_text("".join(f"10.30.{it // 250}.{it % 250} {_name(it)}\n" for it in range(NAMES)))
        with resolver(make, [_service(it) for it in range(NAMES)]) as driver:
            os.sched_setaffinity(driver.process.pid, {0})
            facts |= _both(driver, "resolver", GATEWAYS[0], questions)
            facts["resolver, memory resident"] = f"{driver.memory() >> 20} MiB"
            driver.node.ip("addr", "add", f"{DNSMASQ}/26", "dev", "edge-br0")
            command = ["dnsmasq", "--keep-in-foreground", "--no-resolv", "--no-hosts", "--conf-file=/dev/null"]
            command += [f"--addn-hosts={hosts}", f"--listen-address={DNSMASQ}", "--bind-interfaces", "--pid-file="]
            start = ["ip", "netns", "exec", driver.node.name, "taskset", "-c", "0", *command, f"--cache-size={NAMES}"]
            with subprocess.Popen(start) as other:
                time.sleep(1.5)
                facts |= _both(driver, "dnsmasq", DNSMASQ, questions)
                other.terminate()

    return study("naming", __doc__ or "", facts)
