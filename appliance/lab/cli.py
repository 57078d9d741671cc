"""The commands `appliance lab …`."""

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from appliance.cli import emit, json_option
from appliance.client import ApiError
from appliance.lab import lifecycle, processes
from appliance.lab.files import NoLabError
from appliance.lab.lifecycle import Lab, LabError
from appliance.lab.network import NetworkError
from appliance.lab.plan import DEFAULT_NAME, UNDERLAY_MTU, WEB_V4, Family, Spec, SpecError, setting
from appliance.lab.processes import MARKER

NOT_FOUND = 127
"""Exit status of a command that does not exist, as of a shell."""


@contextmanager
def one_line() -> Iterator[None]:
    """Turns an expected failure into its sentence on standard error and exit status 1."""
    try:
        yield
    except (ApiError, LabError, NetworkError, NoLabError, SpecError) as error:
        click.echo(f"appliance lab: {error}", err=True)
        sys.exit(1)


def report(sentence: str) -> None:
    """Progress, on standard error."""
    click.echo(sentence, err=True)


def _expect_root() -> None:
    if os.geteuid() != 0:
        raise LabError("expected root: a lab is made of network namespaces")


def _terminate(_number: int, _frame: FrameType | None) -> NoReturn:
    """Any of them undoes what `up` has begun, as an interrupt from the terminal does."""
    raise KeyboardInterrupt


@click.group()
@click.option("--name", default=DEFAULT_NAME, envvar=MARKER, show_default=True, help="Name of the lab.")
@click.pass_context
def lab(context: click.Context, name: str) -> None:
    """A network of several nodes on this machine, with real supervisors, workers and packets."""
    context.obj = name


def spec_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say what a lab consists of; `spec` puts them together."""
    options = [
        click.option("--nodes", default=2, show_default=True, help="Nodes on the underlay."),
        click.option("--instances", default=2, show_default=True, help="Instances of the demo service."),
        click.option(
            "--tunnel",
            type=click.Choice(["v4", "v6"]),
            default="v4",
            show_default=True,
            help="Family of the underlay addresses that nodes send to.",
        ),
        click.option(
            "--workers",
            metavar="N[,N…]",
            default="0",
            help="Workers of each node, or of node 1, 2 and so on.  [default: one a CPU]",
        ),
        click.option("--cut", is_flag=True, help="The underlay cuts super-packets (no TSO, no USO)."),
        click.option("--mtu", default=UNDERLAY_MTU, show_default=True, help="MTU of the underlay, bytes."),
        click.option(
            "--set",
            "settings",
            multiple=True,
            metavar="SECTION.KEY=VALUE",
            help="A key of the nodes' configuration, such as offload.udp_gso=false. May be repeated.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def spec(
    name: str, nodes: int, instances: int, tunnel: Family, workers: str, cut: bool, settings: tuple[str, ...], mtu: int
) -> Spec:
    """The lab that the options ask for. Raises SpecError."""
    return Spec(name, nodes, instances, tunnel, _numbers("workers", workers), cut, tuple(map(setting, settings)), mtu)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    """`1,2` as numbers. Raises SpecError."""
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts):
        raise SpecError(f"{option}: expected numbers with commas between them, got {text!r}")
    return tuple(map(int, parts))


def build(wanted: Spec) -> Lab:
    """Builds a lab; an interrupt of any kind undoes that. Raises as `lifecycle.up`."""
    _expect_root()
    for number in processes.INTERRUPTS:
        signal.signal(number, _terminate)
    return lifecycle.up(wanted, report)


@lab.command()
@spec_options
@click.pass_obj
def up(name: str, /, **options: Any) -> None:
    """Build a lab. One of the same name is removed first."""
    with one_line():
        built = build(spec(name, **options))
    report(f"lab {name!r} is up; try: appliance lab exec {built.plan.client().name} -- curl {WEB_V4}")


@lab.command()
@click.pass_obj
def down(name: str) -> None:
    """Remove a lab, and whatever an interrupted or killed command has left of one."""
    with one_line():
        if not lifecycle.exists(name):
            report(f"no lab {name!r}")
            return
        _expect_root()
        lifecycle.down(name, report)


@lab.command()
@click.argument("service")
@click.argument("instances", type=int)
@click.pass_obj
def scale(name: str, service: str, instances: int) -> None:
    """Give SERVICE (`web`, or its whole name) so many INSTANCES."""
    with one_line():
        _expect_root()
        lifecycle.scale(name, service, instances, report)


def _host_command(verb: str, text: str, act: Callable[[str, str], None]) -> None:
    """A command that does something to one host."""

    def run(name: str, host: str) -> None:
        with one_line():
            _expect_root()
            act(name, host)

    lab.command(verb, help=text)(click.argument("host")(click.pass_obj(run)))


_host_command("kill", "Kill all processes of HOST: a node, or `cluster` (manager and broker).", lifecycle.kill)
_host_command("stop", "End HOST, a node or `cluster`, as an operator does.", lifecycle.stop)
_host_command("start", "Start HOST again.", lifecycle.start)
_host_command("unplug", "Pull the cable of HOST.", partial(lifecycle.plug, state="down"))
_host_command("plug", "Put the cable of HOST in again.", partial(lifecycle.plug, state="up"))


@lab.command()
@json_option
@click.pass_obj
def status(name: str, as_json: bool) -> None:
    """Show nodes, containers and services."""
    from appliance.lab import view

    with one_line():
        data = view.data(lifecycle.opened(name))
    emit(data, as_json, lambda: view.screen(data))


@lab.command("exec", context_settings={"ignore_unknown_options": True})
@click.argument("container")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, required=True)
@click.pass_obj
def execute(name: str, container: str, command: tuple[str, ...]) -> None:
    """Run COMMAND in CONTAINER (or in a node, `cluster` or `underlay`), as this process.

    The command gets the signals, and its exit status is that of `exec`.
    """
    with one_line():
        _expect_root()
        opened = lifecycle.opened(name)
        line = opened.command(container, command)
    environment = _environment(opened, container)
    if shutil.which(command[0], path=environment["PATH"]) is None:
        click.echo(f"appliance lab: {command[0]}: command not found", err=True)
        sys.exit(NOT_FOUND)
    os.execvpe(line[0], line, environment)


def _environment(opened: Lab, member: str) -> dict[str, str]:
    """The lab's environment: `appliance` is found there, and in a node its commands find the node's socket."""
    environment = processes.environment(opened.plan.spec.name)
    environment["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])
    if any(node.name == member for node in opened.plan.nodes):
        environment["APPLIANCE_SOCKET"] = str(opened.files.socket(member))
    return environment


@lab.command()
@spec_options
@click.option("--keep/--no-keep", default=True, show_default=True, help="Leave the lab running at the end.")
@click.pass_obj
def demo(name: str, /, keep: bool, **options: Any) -> None:
    """Build a lab, call its service, show who answered and how fast. Exit status 1 if anything is wrong."""
    from appliance.lab.demo import demonstrate

    with one_line():
        built = build(spec(name, **options))
        try:
            right = demonstrate(built)
        finally:
            if not keep:
                lifecycle.down(name, report)
    sys.exit(0 if right else 1)
