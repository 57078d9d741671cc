"""`appliance-cni`, a CNI plugin (specification 1.1.0): a thin client of the local API.

Theory of operation
-------------------
A runtime starts it for each operation, with the operation in the environment (`CNI_COMMAND` …), the network's
configuration on standard input, and the result or one error object expected on standard output. All work is the
supervisor's: links, addresses (there is no IPAM plugin), routes, the announcement to the cluster.

*Owns* one small file an attachment in `STATE`/NETWORK, named CONTAINER:INTERFACE, with what it attached. It is written
before the attachment is asked for and removed after it is undone, so DEL needs nothing but its name, GC finds what the
runtime has forgotten, and a plugin that was killed leaves nothing that DEL or GC would miss. The files are gone after a
reboot, and so are containers.

An attachment is undone only while it is in the namespace that it was made in: an instance that has moved to another
container meanwhile stays there.

Only the standard library is imported, and little of it: an interpreter starts in 6 ms, the plugin in 15, and what it
leaves out (typing, urllib.parse, the half of socket that is in Python) would take 7 more.

Errors are the specification's: 1 version, 2 unsupported field, 3 unknown container, 4 environment, 5 input or output,
6 undecodable, 7 configuration, 11 try again, 50 not available; from 100 on the appliance refuses.
"""

from __future__ import annotations

import json
import os
import sys

from appliance.runtimes.local import RequestError, quote, request

TYPE_CHECKING = False  # without typing, which is a tenth of the start
if TYPE_CHECKING:
    from typing import Any

VERSIONS = ("0.3.1", "0.4.0", "1.0.0", "1.1.0")
SOCKET = "/run/edge-appliance/api.sock"
STATE = "/run/edge-appliance/cni"
LABELS = ("edge-appliance/service", "edge-appliance/instance")
ARGUMENTS = ("APPLIANCE_SERVICE", "APPLIANCE_INSTANCE")
ANNOTATIONS = "io.kubernetes.cri.pod-annotations"
GC_VALID = "cni.dev/valid-attachments"
REFUSED, GONE, NOT_READY = 100, 404, 503


class CniError(Exception):
    """An error object of the specification."""

    def __init__(self, code: int, message: str, details: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.details = details


class Call:
    """One operation: its environment, and the network's configuration."""

    def __init__(self, environment: Any, config: dict[str, Any]) -> None:
        self.environment = environment
        self.config = config
        self.version = str(config.get("cniVersion", "0.1.0"))
        self.network = str(config.get("name", ""))
        self.socket = str(config.get("socket", SOCKET))
        self.directory = os.path.join(str(config.get("state", STATE)), self.network)  # noqa: PTH118

    def variable(self, name: str) -> str:
        """A variable that the operation needs. Raises CniError."""
        value = self.environment.get(name, "")
        if not value:
            raise CniError(4, f"{name}: expected a value, got none")
        return str(value)

    @property
    def arguments(self) -> dict[str, str]:
        """`CNI_ARGS`: KEY=VALUE, separated by semicolons."""
        pairs = (it.partition("=") for it in self.environment.get("CNI_ARGS", "").split(";") if it)
        return {key: value for key, _, value in pairs}

    @property
    def key(self) -> str:
        """The name of the attachment's file. Raises CniError."""
        container, interface = self.variable("CNI_CONTAINERID"), self.variable("CNI_IFNAME")
        if "/" in container + interface or ":" in interface or container.startswith("."):
            raise CniError(4, f"CNI_CONTAINERID, CNI_IFNAME: expected names, got {container!r} and {interface!r}")
        return f"{container}:{interface}"

    def api(self, method: str, target: str, body: object = None) -> tuple[int, dict[str, Any]]:
        """An answer of the appliance. Raises CniError if there is none, or if it is not ready."""
        try:
            status, answer = request(self.socket, method, target, body)
        except RequestError as error:
            raise CniError(50, "the appliance does not answer", str(error)) from None
        if status == NOT_READY:
            raise CniError(11, "the node is not ready", _reason(answer))
        if status >= 400 and status != GONE:
            raise CniError(REFUSED, _reason(answer))
        return status, answer or {}


def _reason(answer: Any) -> str:
    return str(answer.get("error", answer)) if isinstance(answer, dict) else str(answer)


# --- which instance -------------------------------------------------------------------------------------------------


def identity(call: Call) -> tuple[str, int]:
    """Service and instance that a container is to be: the first of these that says so. Raises CniError.

    CNI_ARGS; a pod's annotations; labels (`args.cni.labels`); an alias on this network, or a name of the pod or
    container, of the form SERVICE.NUMBER; the network's configuration. An instance that nobody names is the number at
    the end of the pod's name, as a StatefulSet has it.
    """
    service, instance = "", ""
    for found_service, found_instance in _sources(call):
        service = service or found_service
        instance = instance or found_instance
    if not service:
        raise CniError(7, f"service: expected {ARGUMENTS[0]} in CNI_ARGS, {LABELS[0]} of the pod, or a name like it")
    instance = instance or _ordinal(call.arguments.get("K8S_POD_NAME", ""))
    if not instance.isdecimal():
        raise CniError(7, f"instance: expected a number for {service}, got {instance!r}", " or ".join(LABELS[1:]))
    return service, int(instance)


def _sources(call: Call) -> list[tuple[str, str]]:
    runtime = call.config.get("runtimeConfig") or {}
    cni = (call.config.get("args") or {}).get("cni") or {}
    labels = {it.get("key"): it.get("value") for it in cni.get("labels") or ()}
    aliases = (runtime.get("aliases") or {}).get(call.network) or ()
    named = [_split(str(it)) for it in (*aliases, call.arguments.get("K8S_POD_NAME", ""))]
    return [
        _both(call.arguments, ARGUMENTS),
        _both(runtime.get(ANNOTATIONS) or {}, LABELS),
        _both(labels, LABELS),
        *named,
        _both(call.config, ("service", "instance")),
    ]


def _both(values: Any, keys: tuple[str, str]) -> tuple[str, str]:
    service, instance = (values.get(key) for key in keys)
    return ("" if service is None else str(service)), ("" if instance is None else str(instance))


def _split(name: str) -> tuple[str, str]:
    """SERVICE.NUMBER; nothing if a name is not like this."""
    service, _, number = name.rpartition(".")
    return (service, number) if service.count(".") == 3 and number.isdecimal() else ("", "")


def _ordinal(name: str) -> str:
    return name.rpartition("-")[2] if "-" in name else ""


# --- files ----------------------------------------------------------------------------------------------------------


def remember(call: Call, record: dict[str, Any]) -> None:
    """Keeps what is about to be attached. Raises CniError."""
    path = f"{call.directory}/{call.key}"
    try:
        os.makedirs(call.directory, exist_ok=True)  # noqa: PTH103 - pathlib costs a third of the start
        with open(path + ".new", "w") as file:  # noqa: PTH123
            json.dump(record, file)
        os.replace(path + ".new", path)  # noqa: PTH105
    except OSError as error:
        raise CniError(5, f"{path}: {error.strerror}") from None


def recall(call: Call, key: str) -> dict[str, Any] | None:
    """What was attached; None if nothing. Raises CniError."""
    path = f"{call.directory}/{key}"
    try:
        with open(path) as file:  # noqa: PTH123
            record: dict[str, Any] = json.load(file)
            return record
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CniError(5, f"{path}: {error}") from None


def forget(call: Call, key: str) -> None:
    """Nothing is attached any more."""
    try:  # noqa: SIM105 - contextlib is another module to load
        os.unlink(f"{call.directory}/{key}")  # noqa: PTH108
    except FileNotFoundError:
        pass


# --- operations -----------------------------------------------------------------------------------------------------


def add(call: Call) -> dict[str, Any]:
    """Attaches a container; the result."""
    namespace, interface = call.variable("CNI_NETNS"), call.variable("CNI_IFNAME")
    service, instance = identity(call)
    record = {"service": service, "instance": instance, "netns": f"path:{namespace}"}
    remember(call, record)
    body = {"service": service, "instance": instance, "path": namespace, "interface": interface}
    try:
        status, made = call.api("POST", "/v1/attachments", body)
        if status == GONE:
            raise CniError(50, f"{call.socket}: expected this version's API")
    except CniError:
        delete(call)
        raise
    return result(call, made, namespace)


def delete(call: Call) -> None:
    """Undoes an attachment; nothing if there is none."""
    _undo(call, call.key)


def _undo(call: Call, key: str) -> None:
    record = recall(call, key)
    if record is not None:
        call.api("DELETE", f"{_target(record)}?netns={quote(record['netns'])}")
        forget(call, key)


def _target(record: dict[str, Any]) -> str:
    return f"/v1/attachments/{quote(record['service'])}/{record['instance']}"


def check(call: Call) -> None:
    """Raises CniError unless the container is attached as the previous result says."""
    record = recall(call, call.key)
    status, now = (GONE, {}) if record is None else call.api("GET", _target(record))
    if status == GONE or now["netns"] != f"path:{call.variable('CNI_NETNS')}":
        raise CniError(3, f"{call.key}: expected an attachment, got none")
    if now["condition"] != "whole":
        raise CniError(REFUSED, f"{now['interface']}: expected a whole link, got one that is {now['condition']}")
    had = {it.get("address") for it in (call.config.get("prevResult") or {}).get("ips", ())}
    lost = set(_addresses(now)) - had if had else set()
    if lost or now["interface"] != call.variable("CNI_IFNAME"):
        raise CniError(REFUSED, f"{call.key}: expected what the previous result has, got {', '.join(_addresses(now))}")


def collect(call: Call) -> None:
    """Undoes what is attached to this network and not on the runtime's list."""
    valid = {f"{it['containerID']}:{it['ifname']}" for it in call.config.get(GC_VALID) or ()}
    try:
        present = os.listdir(call.directory)  # noqa: PTH208
    except FileNotFoundError:
        return
    for key in present:
        if key not in valid and not key.endswith(".new"):
            _undo(call, key)


def status(call: Call) -> None:
    """Raises CniError unless containers can be attached now."""
    try:
        call.api("GET", "/v1/ready")
    except CniError as error:
        raise CniError(50, str(error), error.details) from None


def version(call: Call) -> dict[str, Any]:
    """What this plugin understands."""
    return {"cniVersion": call.version, "supportedVersions": VERSIONS}


COMMANDS: dict[str, Any] = {"ADD": add, "DEL": delete, "CHECK": check, "GC": collect, "STATUS": status}


# --- results --------------------------------------------------------------------------------------------------------


def result(call: Call, made: dict[str, Any], namespace: str) -> dict[str, Any]:
    """A result of the configuration's version; what an earlier plugin of the chain made comes first."""
    before = call.config.get("prevResult") or {}
    interfaces = list(before.get("interfaces") or ())
    outside: dict[str, Any] = {"name": made["veth"]}
    inside: dict[str, Any] = {"name": made["interface"], "mac": made["mac"], "sandbox": namespace}
    if call.version == "1.1.0":
        outside["mtu"] = inside["mtu"] = made["mtu"]
    ips = [_ip(call.version, made, family, len(interfaces) + 1) for family in ("v4", "v6") if made[f"address_{family}"]]
    routes = [{"dst": "0.0.0.0/0" if "." in it["gateway"] else "::/0", "gw": it["gateway"]} for it in ips]
    return {
        "cniVersion": call.version,
        "interfaces": [*interfaces, outside, inside],
        "ips": [*(before.get("ips") or ()), *ips],
        "routes": [*(before.get("routes") or ()), *routes],
        "dns": made["dns"],
    }


def _ip(version: str, made: dict[str, Any], family: str, interface: int) -> dict[str, Any]:
    address = made[f"address_{family}"]
    text = f"{address}/{made['prefixes'][address]}"
    found = {"address": text, "gateway": made[f"gateway_{family}"], "interface": interface}
    return found if version[0] == "1" else {"version": family[1], **found}


def _addresses(made: dict[str, Any]) -> list[str]:
    return [f"{address}/{length}" for address, length in made["prefixes"].items()]


# --- the program ----------------------------------------------------------------------------------------------------


def run(environment: Any, text: str) -> dict[str, Any] | None:
    """Carries out one operation. Raises CniError."""
    command = environment.get("CNI_COMMAND", "")
    if command != "VERSION" and command not in COMMANDS:
        raise CniError(4, f"CNI_COMMAND: expected VERSION, {', '.join(COMMANDS)}, got {command!r}")
    try:
        config = json.loads(text)
    except ValueError as error:
        raise CniError(6, f"configuration: expected JSON: {error}") from None
    if not isinstance(config, dict):
        raise CniError(6, "configuration: expected a JSON object")
    call = Call(environment, config)
    if command == "VERSION":
        return version(call)
    if call.version not in VERSIONS:
        raise CniError(1, f"cniVersion: expected one of {', '.join(VERSIONS)}, got {call.version}")
    if not call.network or "/" in call.network or call.network.startswith("."):
        raise CniError(7, f"name: expected the network's name, got {call.network!r}")
    if config.get("ipam"):
        raise CniError(2, "ipam: expected none, as addresses are the appliance's")
    done: dict[str, Any] | None = COMMANDS[command](call)
    return done


def main() -> int:
    """The plugin."""
    text = sys.stdin.read()
    try:
        done = run(os.environ, text)
    except CniError as error:
        found = {"code": error.code, "msg": str(error), "details": error.details}
        try:
            found = {"cniVersion": json.loads(text)["cniVersion"], **found}
        except (ValueError, KeyError, TypeError):
            found = {"cniVersion": VERSIONS[-1], **found}
        print(json.dumps(found))
        return 1
    if done is not None:
        print(json.dumps(done))
    return 0


if __name__ == "__main__":
    sys.exit(main())
