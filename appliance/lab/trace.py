"""Sequence diagrams of what a lab's nodes and cluster say to each other, drawn from what they did say.

    python -m appliance.lab.trace > docs/sequences.md        (make sequences)

Theory of operation
-------------------
A `Recorder` notes two kinds of messages while something happens in a lab: what is published on the broker, as a
subscriber to everything in the cluster's namespace sees it (a thread of its own, with its own event loop), and the HTTP
requests that this process makes. Both are ordered by the time at which they were seen here, which for messages
of two nodes within a millisecond may be the wrong way round; so a diagram is compared by what it says, not by order
(`arrows`).

A message that is said again and again is drawn once. Requests that only look are not drawn.
"""

import asyncio
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection
from typing import Any

import aiomqtt
import click
import orjson

from appliance.client import ApiError
from appliance.lab import lifecycle, network
from appliance.lab.lifecycle import Lab, LabError
from appliance.lab.plan import MQTT_PORT, WEB_V4, Container, Node, Spec
from appliance.lab.probe import call

NAME = "trace"
QUIET_S = 0.5
"""A scene has ended when nothing was said for so long."""
SCENE_S = 20.0
PARTICIPANTS = {
    "operator": "operator or orchestrator",
    "cluster": "broker and manager",
    "node1": "node1",
    "node2": "node2",
}
OFFLINE = "status offline"
ANSWERS = ("subnetwork/result", "tablequery/result")
"""Kinds of messages to a node; it publishes the others."""
HEAD = """# Sequences

What is said when something happens, as the lab's broker and HTTP interfaces saw it. Drawn by `make sequences`, not by
hand: `python -m appliance.lab.trace` builds a lab of two nodes and lets these things happen in it. Solid arrows with a
full head are HTTP, those with an open one are MQTT. A message that is repeated is drawn once.
"""


@dataclass(frozen=True)
class Message:
    """Something that was said: `at` is CLOCK_MONOTONIC seconds."""

    at: float
    sender: str
    receiver: str
    text: str
    arrow: str = "-)"

    def line(self) -> str:
        """As Mermaid draws it."""
        return f"    {self.sender}{self.arrow}{self.receiver}: {self.text}"


class Recorder:
    """Notes what is said in a lab. See the module's theory of operation."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._names = {it.id: it.name for it in lab.plan.nodes}
        self._heard: list[Message] = []
        self._offline: set[str] = set()
        self._lock = threading.Lock()
        self._ready = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None

    @contextmanager
    def running(self) -> Iterator["Recorder"]:
        """Listens while the block runs. Raises LabError if the broker cannot be reached."""
        with ThreadPoolExecutor(max_workers=1) as pool:
            thread = pool.submit(network.inside, self._lab.plan.cluster.namespace, lambda: asyncio.run(self._listen()))
            try:
                if not self._ready.wait(SCENE_S):
                    raise LabError("trace: expected to subscribe at the broker")
                with self._requests():
                    yield self
            finally:
                if self._loop is not None and self._stop is not None:
                    self._loop.call_soon_threadsafe(self._stop.set)
            thread.result()

    def scene(self, act: Callable[[], object], done: Callable[[], bool]) -> list[Message]:
        """What is said from now on until an act has had its effect and nothing more follows. Raises LabError."""
        with self._lock:
            self._heard.clear()
        act()
        deadline = time.monotonic() + SCENE_S
        while not (done() and self._is_quiet()):
            if time.monotonic() > deadline:
                raise LabError(f"trace: expected the lab to become quiet, got {len(self._heard)} messages")
            time.sleep(0.05)
        with self._lock:
            return sorted(self._heard, key=lambda it: it.at)

    def _is_quiet(self) -> bool:
        with self._lock:
            return bool(self._heard) and time.monotonic() - max(it.at for it in self._heard) > QUIET_S

    def _note(self, message: Message) -> None:
        with self._lock:
            self._heard.append(message)

    async def _listen(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        async with aiomqtt.Client(str(self._lab.plan.cluster.underlay_v4), MQTT_PORT, identifier="trace") as client:
            for topic in ("nodes/#", "jobs/#"):
                await client.subscribe(topic, qos=1)
            self._ready.set()
            reading = asyncio.ensure_future(self._read(client))
            await self._stop.wait()
            reading.cancel()
            with suppress(asyncio.CancelledError):
                await reading

    async def _read(self, client: aiomqtt.Client) -> None:
        async for message in client.messages:
            if not message.retain:
                for it in self._published(str(message.topic), bytes(message.payload or b"")):
                    self._note(it)

    def _published(self, topic: str, payload: bytes) -> Iterator[Message]:
        """Who said a message on a topic to whom. What follows a job goes to those that are interested in it."""
        now, parts = time.monotonic(), topic.split("/")
        if parts[0] == "nodes" and (node := self._names.get(parts[1])) is not None:
            kind = "/".join(parts[3:])
            text = f"{kind}{_detail(kind, payload)}"
            if text == OFFLINE:
                self._offline.add(node)
                yield Message(now, "cluster", "cluster", f"{OFFLINE}, as the last will of {node}")
                return
            self._offline.discard(node)
            yield Message(now, *(("cluster", node) if kind in ANSWERS else (node, "cluster")), text)
        elif parts[0] == "jobs":
            for node in self._names.values():
                if node not in self._offline and parts[1] in self._interests.get(node, ()):
                    yield Message(now, "cluster", node, f"jobs/{parts[1]}/updates_available")

    @property
    def _interests(self) -> dict[str, set[str]]:
        """The jobs that each node follows, as its own API has them."""
        found: dict[str, set[str]] = {}
        for node in filter(self._lab.supervisor, self._lab.plan.nodes):
            with suppress(ApiError):  # it is starting, or ending
                status = self._lab.api(node).cluster()
                found[node.name] = {it["job"] for it in status.get("interests", [])}
        return found

    @contextmanager
    def _requests(self) -> Iterator[None]:
        """Notes the requests of this process that change something; not what `scale` asks to see whether it is done."""
        original = HTTPConnection.putrequest

        def putrequest(connection: HTTPConnection, method: str, url: str, *rest: Any, **more: Any) -> None:
            if url != "/v1/need" and method != "GET":
                receiver = self._receiver(connection)
                self._note(Message(time.monotonic(), "operator", receiver, f"{method} {url}", "->>"))
            original(connection, method, url, *rest, **more)

        HTTPConnection.putrequest = putrequest  # type: ignore[assignment,method-assign]
        try:
            yield
        finally:
            HTTPConnection.putrequest = original  # type: ignore[method-assign]

    def _receiver(self, connection: HTTPConnection) -> str:
        where = " ".join(map(str, vars(connection).values()))
        nodes = (it.name for it in self._lab.plan.nodes if str(self._lab.files.socket(it.name)) in where)
        return next(nodes, "cluster")


def _detail(kind: str, payload: bytes) -> str:
    """What distinguishes messages of a kind: a status, or what a query is about."""
    try:
        data = orjson.loads(payload)
    except orjson.JSONDecodeError:
        return ""
    if kind == "status":
        return f" {data.get('status')}"
    if kind == "tablequery/request":
        return f" {data.get('sname') or data.get('sip')}"
    name = data.get("app_name") or data.get("appname")
    return f" {name}" if name else ""


# --- Scenes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """Something that happens in a lab, and how one sees that it has."""

    title: str
    sentence: str
    act: Callable[[Lab], object]
    done: Callable[[Lab], bool]


def _join_anew(lab: Lab) -> None:
    """Node 2 as it is at its very first start: without anything on its disk."""
    node = lab.plan.nodes[1]
    lifecycle.start(lab.plan.spec.name, node.name)


def _forget(lab: Lab) -> None:
    node = lab.plan.nodes[1]
    lifecycle.stop(lab.plan.spec.name, node.name)
    shutil.rmtree(lab.files.of(node.name) / "state")


def _first_call(lab: Lab) -> None:
    network.inside(lab.plan.client(2).namespace, lambda: call(str(WEB_V4), 80))


def _is_up(lab: Lab, *containers: Container) -> bool:
    picture = lab.manager.picture()
    return all(map(picture.is_up, containers))


def _of(lab: Lab, node: Node) -> list[Container]:
    return [it for it in lab.plan.containers if it.node == node]


def _back(lab: Lab) -> bool:
    return _is_up(lab, *_of(lab, lab.plan.nodes[1]))


def _lost(lab: Lab) -> bool:
    picture = lab.manager.picture()
    return not any(map(picture.is_up, _of(lab, lab.plan.nodes[1])))


def _scale(instances: int) -> Callable[[Lab], object]:
    return lambda lab: lifecycle.scale(lab.plan.spec.name, "web", instances)


def _cable(state: Any) -> Callable[[Lab], object]:
    return lambda lab: lifecycle.plug(lab.plan.spec.name, "node2", state)


def _always(_: Lab) -> bool:
    return True


SCENES = (
    Scene("Registration", "A node starts for the first time, and a container is there already.", _join_anew, _back),
    Scene(
        "A first call",
        "A container of node 2 calls a service that its node does not know: its first packet waits for the answer.",
        _first_call,
        _always,
    ),
    Scene("Deployment and scaling up", "A second instance is deployed, and attached at node 2.", _scale(2), _always),
    Scene("Scaling down", "The second instance is taken back.", _scale(1), _always),
    Scene("A node is lost", "Node 2 dies with all its processes.", lambda lab: lifecycle.kill(NAME, "node2"), _lost),
    Scene("It returns", "Node 2 starts again, with what it has on its disk.", _join_anew, _back),
    Scene("A partition", "Node 2 loses its cable: the broker hears nothing any more.", _cable("down"), _lost),
    Scene("The partition ends", "The cable is back.", _cable("up"), _back),
)


def play(lab: Lab, scenes: tuple[Scene, ...] = SCENES) -> Iterator[tuple[Scene, list[Message]]]:
    """Lets scenes happen in a lab of two nodes and one instance, in this order, from Registration on."""
    with Recorder(lab).running() as recorder:
        _forget(lab)
        while not _lost(lab):
            time.sleep(0.05)
        time.sleep(QUIET_S)
        for scene in scenes:
            click.echo(scene.title, err=True)
            yield scene, recorder.scene(lambda it=scene: it.act(lab), lambda it=scene: it.done(lab))  # type: ignore[misc]


def diagram(messages: list[Message]) -> str:
    """A Mermaid sequence diagram; what was said several times is in it once."""
    lines = dict.fromkeys(it.line() for it in messages)
    shown = {name for it in messages for name in (it.sender, it.receiver)}
    participants = [f"    participant {key} as {text}" for key, text in PARTICIPANTS.items() if key in shown]
    return "\n".join(["sequenceDiagram", *participants, *lines])


def arrows(text: str) -> set[tuple[str, str, str]]:
    """What a diagram says: sender, receiver, kind of message. Its details and their order are left out."""
    found = re.findall(r"^\s*(\w+)(?:-\)|->>)(\w+): (\S+(?: /\S+)?)", text, re.MULTILINE)
    return {(sender, receiver, kind) for sender, receiver, kind in found}


def document(played: Iterator[tuple[Scene, list[Message]]]) -> str:
    """docs/sequences.md"""
    parts = [f"## {it.title}\n\n{it.sentence}\n\n```mermaid\n{diagram(said)}\n```\n" for it, said in played]
    return "\n".join([HEAD, *parts])


@click.command()
def main() -> None:
    """Prints docs/sequences.md."""
    lab = lifecycle.up(Spec(NAME, nodes=2, instances=1, workers=(1,)))
    try:
        click.echo(document(play(lab)), nl=False)
    finally:
        lifecycle.down(NAME)


if __name__ == "__main__":
    main()
