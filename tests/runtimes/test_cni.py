"""The CNI plugin without an appliance: who a container is to be, what results look like, how errors are told."""

import json
import subprocess
import sys

import pytest

from appliance.runtimes import cni
from appliance.runtimes.cni import Call, CniError, identity, result, run

CONFIG = {"cniVersion": "1.1.0", "name": "edge", "type": "appliance-cni"}
JOB = "app.ns.web.test"
MADE = {
    "interface": "eth0",
    "address_v4": "10.18.0.2",
    "address_v6": "fc00::2",
    "gateway_v4": "10.18.0.1",
    "gateway_v6": "fc00::1",
    "veth": "ea0123456789",
    "mac": "02:ea:0a:12:00:02",
    "mtu": 1450,
    "prefixes": {"10.18.0.2": 26, "fc00::2": 120},
    "dns": {"nameservers": ["10.18.0.1"], "search": ["test.app.ns.local"], "options": ["ndots:2"]},
}


def call(cni_args: str = "", **config: object) -> Call:
    return Call({"CNI_ARGS": cni_args}, {**CONFIG, **config})


@pytest.mark.parametrize(
    ("args", "config"),
    [
        (f"IgnoreUnknown=1;APPLIANCE_SERVICE={JOB};APPLIANCE_INSTANCE=2", {}),
        (f"IgnoreUnknown=1;K8S_POD_NAME={JOB}.2", {}),
        ("", {"runtimeConfig": {cni.ANNOTATIONS: {"edge-appliance/service": JOB, "edge-appliance/instance": "2"}}}),
        ("K8S_POD_NAME=web-2", {"runtimeConfig": {cni.ANNOTATIONS: {"edge-appliance/service": JOB}}}),
        ("", {"runtimeConfig": {"aliases": {"edge": ["0123456789ab", f"{JOB}.2"], "other": [f"{JOB}.7"]}}}),
        ("", {"args": {"cni": {"labels": [{"key": "edge-appliance/service", "value": JOB}]}}, "instance": 2}),
        ("", {"service": JOB, "instance": 2}),
        (f"APPLIANCE_SERVICE={JOB};APPLIANCE_INSTANCE=2;K8S_POD_NAME=a.b.c.d.9", {"service": "x", "instance": 1}),
    ],
)
def test_who_a_container_is(args, config):
    assert identity(call(args, **config)) == (JOB, 2)


@pytest.mark.parametrize(("args", "field"), [("", "service"), (f"APPLIANCE_SERVICE={JOB};K8S_POD_NAME=x", "instance")])
def test_who_cannot_be_told(args, field):
    with pytest.raises(CniError, match=f"^{field}: expected") as raised:
        identity(call(args))
    assert raised.value.code == 7


def test_results_of_each_version():
    assert result(call(), MADE, "/run/netns/x") == {
        "cniVersion": "1.1.0",
        "interfaces": [
            {"name": "ea0123456789", "mtu": 1450},
            {"name": "eth0", "mac": MADE["mac"], "sandbox": "/run/netns/x", "mtu": 1450},
        ],
        "ips": [
            {"address": "10.18.0.2/26", "gateway": "10.18.0.1", "interface": 1},
            {"address": "fc00::2/120", "gateway": "fc00::1", "interface": 1},
        ],
        "routes": [{"dst": "0.0.0.0/0", "gw": "10.18.0.1"}, {"dst": "::/0", "gw": "fc00::1"}],
        "dns": MADE["dns"],
    }
    older = result(call(cniVersion="1.0.0"), MADE, "/run/netns/x")
    assert all("mtu" not in it for it in older["interfaces"])
    assert [it["version"] for it in result(call(cniVersion="0.4.0"), MADE, "/x")["ips"]] == ["4", "6"]


def test_what_an_earlier_plugin_made_comes_first():
    before = {"interfaces": [{"name": "lo"}], "ips": [{"address": "127.0.0.1/8", "interface": 0}]}
    made = result(call(prevResult=before), MADE, "/x")
    assert [it["name"] for it in made["interfaces"]] == ["lo", "ea0123456789", "eth0"]
    assert [it["interface"] for it in made["ips"]] == [0, 2, 2]


@pytest.mark.parametrize(
    ("environment", "text", "code"),
    [
        ({}, "{}", 4),
        ({"CNI_COMMAND": "REMOVE"}, "{}", 4),
        ({"CNI_COMMAND": "ADD"}, "{", 6),
        ({"CNI_COMMAND": "ADD"}, "[]", 6),
        ({"CNI_COMMAND": "ADD"}, json.dumps({**CONFIG, "cniVersion": "0.1.0"}), 1),
        ({"CNI_COMMAND": "ADD"}, json.dumps({**CONFIG, "name": "../x"}), 7),
        ({"CNI_COMMAND": "ADD"}, json.dumps({**CONFIG, "ipam": {"type": "host-local"}}), 2),
        ({"CNI_COMMAND": "ADD"}, json.dumps(CONFIG), 4),
        ({"CNI_COMMAND": "DEL", "CNI_CONTAINERID": "../x", "CNI_IFNAME": "eth0"}, json.dumps(CONFIG), 4),
        ({"CNI_COMMAND": "STATUS"}, json.dumps({**CONFIG, "socket": "/nonexistent"}), 50),
    ],
)
def test_errors_have_the_specifications_codes(environment, text, code):
    with pytest.raises(CniError) as raised:
        run(environment, text)
    assert raised.value.code == code


def test_what_was_never_added_is_deleted_without_the_appliance(tmp_path):
    environment = {"CNI_COMMAND": "DEL", "CNI_CONTAINERID": "x", "CNI_IFNAME": "eth0"}
    assert run(environment, json.dumps({**CONFIG, "socket": "/nonexistent", "state": str(tmp_path)})) is None
    assert run({"CNI_COMMAND": "GC"}, json.dumps({**CONFIG, "socket": "/nonexistent", "state": str(tmp_path)})) is None


def test_the_program():
    def program(environment: dict[str, str], text: str) -> tuple[int, dict[str, object]]:
        command = [sys.executable, "-m", "appliance.runtimes.cni"]
        done = subprocess.run(command, input=text, env=environment, capture_output=True, text=True, timeout=20)
        return done.returncode, json.loads(done.stdout)

    status, said = program({"CNI_COMMAND": "VERSION"}, '{"cniVersion": "1.1.0"}')
    assert (status, said["supportedVersions"]) == (0, ["0.3.1", "0.4.0", "1.0.0", "1.1.0"])
    status, said = program({"CNI_COMMAND": "ADD"}, json.dumps({**CONFIG, "cniVersion": "9"}))
    assert (status, said["code"], said["cniVersion"]) == (1, 1, "9")


def test_it_imports_little():
    ask = "import sys; before = set(sys.modules); import appliance.runtimes.cni; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True, timeout=20)
    roots = {name.partition(".")[0] for name in done.stdout.split()}
    assert roots - {"appliance"} <= {*sys.stdlib_module_names, "_json", "_socket"}
    assert not roots & {"http", "ssl", "email", "asyncio", "re", "pathlib", "subprocess", "logging"} - {"re"}
