"""What `make lab` shows: who answers the service's calls, as whom, how fast, and what the workers counted.

Everything shown is also checked; a sentence that is not true is shown as such and makes the demonstration fail.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.columns import Columns
from rich.console import Console
from rich.table import Table

from appliance.lab import measure, processes
from appliance.lab.lifecycle import Lab, LabError
from appliance.lab.measure import OutputError
from appliance.lab.plan import DEFAULT_NAME, IPERF_PORTS, WEB_SERVICE, WEB_V4, WEB_V6, Container, Family, dns_name
from appliance.screens import PIPE_WIDTH, cell

FAMILIES: tuple[Family, ...] = ("v4", "v6")
CALLS = 20
ECHOES = 5
SECONDS = 2
COMMAND_TIMEOUT_S = 60.0
SHOWN_COUNTERS = ("tun_packets", "tun_bytes", "wire_packets", "wire_bytes", "flows_opened")


@dataclass(frozen=True)
class Check:
    """A sentence about what was seen, and whether it is true."""

    sentence: str
    true: bool


@dataclass(frozen=True)
class Call:
    """One call of the service: who answered, and which worker of the client's node has its flow."""

    family: Family
    protocol: str
    port: int
    worker: int | None
    container: str
    client: str
    reply_from: str


def demonstrate(lab: Lab) -> bool:
    """Calls, pings and loads the demo service from node 1's client, and prints what happened; whether all is right."""
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)
    checks = []
    for part in (_calls_part, _names_part, _echoes_part, _rates_part, _workers_part):
        try:
            checks += list(part(lab, console))
        except (LabError, OutputError) as error:
            checks.append(Check(str(error), False))
    for check in checks:
        console.print("[green]ok[/]    " if check.true else "[bold red]wrong[/] ", check.sentence, markup=True)
    _how_to_go_on(lab, console)
    return all(check.true for check in checks)


def _output(lab: Lab, member: str, command: Sequence[str]) -> str:
    """What a command prints in a container. Raises LabError with its errors if it fails."""
    line, environment = lab.command(member, command), processes.environment(lab.plan.spec.name)
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, env=environment)
    except subprocess.TimeoutExpired:
        raise LabError(f"{member}: {' '.join(command)}: not done in {COMMAND_TIMEOUT_S:g} s") from None
    if done.returncode != 0:
        errors = (done.stderr or done.stdout).strip()
        raise LabError(f"{member}: {' '.join(command)}: status {done.returncode}: {errors}")
    return done.stdout


def _service_ip(family: Family) -> str:
    return str(WEB_V4 if family == "v4" else WEB_V6)


def _instance_ip(lab: Lab, container: Container, family: Family) -> str:
    placed = lab.manager.picture().placed(container)
    return str(placed.instance_v4 if family == "v4" else placed.instance_v6)


# --- Calls --------------------------------------------------------------------------------------


def _calls_part(lab: Lab, console: Console) -> Iterator[Check]:
    """CALLS requests over each protocol and family."""
    client = lab.plan.client()
    made = {family: _calls(lab, client, family) for family in FAMILIES}
    console.print("Each worker of a node goes round the instances by itself, so its calls are shown together.\n")
    console.print(Columns([_calls_table(family, calls) for family, calls in made.items()], padding=(1, 4)))
    for family, calls in made.items():
        client_ip = _instance_ip(lab, client, family)
        yield from judge(calls, [it.name for it in lab.plan.web], client_ip, _service_ip(family))


def _calls(lab: Lab, client: Container, family: Family) -> list[Call]:
    command = [sys.executable, "-m", "appliance.lab.probe", _service_ip(family), "--times", str(CALLS)]
    results = json.loads(_output(lab, client.name, command))
    owners = owning(lab.api(client.node).flows(), _service_ip(family))
    return [_call(family, it, owners.get((it["protocol"], it["port"]))) for it in results]


def owning(flows: Iterable[Mapping[str, Any]], address: str) -> dict[tuple[str, int], int]:
    """The worker of each flow to an address, by protocol and own port. Flows to elsewhere may have the same port, and
    another worker."""
    dialled = ip_address(address)
    return {(it["protocol"], it["local_port"]): it["worker"] for it in flows if ip_address(it["dialled"]) == dialled}


def _call(family: Family, result: Mapping[str, Any], worker: int | None) -> Call:
    kept = ("protocol", "port", "container", "client", "reply_from")
    return Call(family=family, worker=worker, **{name: result[name] for name in kept})


def _calls_table(family: Family, calls: Iterable[Call]) -> Table:
    """The HTTP calls, a line for each, by worker and then in order."""
    table = Table(title=f"HTTP calls of {_service_ip(family)}", title_justify="left", box=None)
    for name in ("worker", "port", "answered by", "sees us as", "reply from"):
        table.add_column(name, no_wrap=True)
    over_http = (call for call in calls if call.protocol == "tcp")
    for call in sorted(over_http, key=lambda call: -1 if call.worker is None else call.worker):
        table.add_row(cell(call.worker), str(call.port), call.container, call.client, call.reply_from)
    return table


def judge(calls: Sequence[Call], instances: Sequence[str], client_ip: str, service_ip: str) -> Iterator[Check]:
    """What must be true of calls of one family that a client made to a service."""
    answered = {name: sum(call.container == name for call in calls) for name in instances}
    shares = ", ".join(f"{name} {count}" for name, count in answered.items())
    tcp = sum(call.protocol == "tcp" for call in calls)
    yield Check(
        f"{tcp} HTTP and {len(calls) - tcp} UDP calls of {service_ip} were answered by all instances ({shares})",
        all(answered.values()),
    )
    yield Check(
        "they took turns: no worker gave an instance two calls in a row",
        len(instances) == 1 or all(one != other for turn in turns(calls) for one, other in pairwise(turn)),
    )
    yield Check(
        f"the instances saw the client as {client_ip}, its instance IP",
        all(ip_address(call.client) == ip_address(client_ip) for call in calls),
    )
    yield Check(
        f"every reply came from the ServiceIP {service_ip}",
        all(ip_address(call.reply_from) == ip_address(service_ip) for call in calls),
    )


def turns(calls: Iterable[Call]) -> list[list[str]]:
    """Who answered, in order, for each worker; its round goes on over the protocols."""
    by_worker: dict[int | None, list[str]] = {}
    for call in calls:
        by_worker.setdefault(call.worker, []).append(call.container)
    return list(by_worker.values())


# --- Names ---------------------------------------------------------------------------------------


def _names_part(lab: Lab, console: Console) -> Iterator[Check]:
    """A call by each of the names that containers beside the service may use."""
    client = lab.plan.client()
    own = {it.name for it in lab.plan.web if it.node == client.node}
    for name in ("web", f"closest.{dns_name(WEB_SERVICE)}"):
        answered = json.loads(_output(lab, client.name, ["curl", "-sf", "--max-time", "10", f"http://{name}/"]))
        expected = own if name.startswith("closest.") else {it.name for it in lab.plan.web}
        sentence = f"curl http://{name} was answered by {answered['container']} on {answered['node']}"
        yield Check(sentence, answered["container"] in expected)


# --- Echoes and rates ---------------------------------------------------------------------------


def _echoes_part(lab: Lab, console: Console) -> Iterator[Check]:
    """Echo requests to the ServiceIP."""
    for family in FAMILIES:
        command = measure.ping_command(_service_ip(family), ECHOES)
        echo = measure.ping_result(_output(lab, lab.plan.client().name, command))
        answered = f"{echo.received} of {echo.sent} answered, average {echo.average_ms} ms"
        yield Check(f"ping {_service_ip(family)}: {answered}", echo.received == echo.sent == ECHOES)


def _rates_part(lab: Lab, console: Console) -> Iterator[Check]:
    """Load on two instances, each by its own ServiceIP: the connections of a test belong together.

    A server a test: between two tests iperf3 closes its listening socket, and refuses who comes at that moment.
    """
    client = lab.plan.client()
    for container in lab.plan.web[:2]:
        for family, port in zip(FAMILIES, IPERF_PORTS, strict=False):
            address = _instance_ip(lab, container, family)
            command = measure.iperf_command(address, port, SECONDS)
            rate = measure.iperf_result(_output(lab, client.name, command))
            way = "on the same node" if container.node == client.node else f"to {container.node.name}"
            yield Check(f"iperf3 {address} ({container.name}, {way}): {rate}", rate.bits_per_second > 0)


# --- Workers ------------------------------------------------------------------------------------


def _workers_part(lab: Lab, console: Console) -> Iterator[Check]:
    """What each worker of each node has carried."""
    table = Table(title="workers", title_justify="left", box=None)
    for name in ("node", "worker", "cpu", *SHOWN_COUNTERS):
        table.add_column(name, justify="right")
    for node in lab.plan.nodes:
        workers = lab.api(node).status()["workers"]
        for worker in workers:
            counts = [cell(worker["counters"][name]) for name in SHOWN_COUNTERS]
            table.add_row(node.name, str(worker["index"]), str(worker["cpu"]), *counts)
        carried = all(worker["counters"]["tun_packets"] + worker["counters"]["wire_packets"] for worker in workers)
        yield Check(f"{node.name}: every one of {len(workers)} workers carried packets", carried)
    console.print(table)


def _how_to_go_on(lab: Lab, console: Console) -> None:
    name = lab.plan.spec.name
    command = f"{_program()} lab" + ("" if name == DEFAULT_NAME else f" --name {name}")
    client, web = lab.plan.client().name, lab.plan.web[-1]
    console.print(
        f"""
The lab {name!r} is running. Go on with, for instance:

  {command} status
  {command} exec {client} -- curl -s http://web
  {command} exec {client} -- dig +search closest.web
  {command} exec {client} -- ping {WEB_V6}
  {command} exec {client} -- iperf3 -c {_instance_ip(lab, web, "v4")}
  {command} exec {web.node.name} -- appliance status
  {command} exec cluster -- appliance services
  {command} scale web {len(lab.plan.web) + 1}
  {command} kill {web.node.name}
  {command} down
""",
        markup=False,
    )


def _program() -> str:
    """How the user calls the appliance: by its name, if that is what the shell finds."""
    called = sys.argv[0]
    if called.endswith(".py"):
        return f"{sys.executable} -m appliance"
    found = shutil.which("appliance")
    return "appliance" if found and Path(found).samefile(called) else called
