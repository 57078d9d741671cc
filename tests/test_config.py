"""The configuration: what is accepted, and that what is wrong is named by file, line, key and expectation."""

import json
import tomllib
from ipaddress import IPv4Network, ip_address
from pathlib import Path
from textwrap import dedent

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.config import (
    Config,
    ConfigError,
    Key,
    differences,
    from_data,
    is_reloadable,
    keys,
    load,
    parse,
)
from appliance.config_text import example, in_force, schema
from appliance.toml_lines import Lines
from tests.conftest import ROOT


def problems(text: str, cpus: int | None = 2) -> list[str]:
    """The error lines of a text that must be refused."""
    with pytest.raises(ConfigError) as caught:
        parse(text, "f", cpus)
    return str(caught.value).split("\n")


# --- The example file ---------------------------------------------------------------------------


def test_the_example_in_the_repository_is_the_models() -> None:
    shipped = (ROOT / "config/appliance.toml").read_text()
    assert shipped == example(), "config/appliance.toml is out of date: run `make config`"


def uncommented(text: str) -> str:
    """The example with every key in force."""
    return "\n".join(line.removeprefix("#") if line[1:2] not in (" ", "") else line for line in text.split("\n"))


def test_the_example_means_the_defaults_commented_or_not() -> None:
    assert parse(example(), "f") == Config()
    assert parse(uncommented(example()), "f") == Config()


def test_the_example_states_every_key_with_its_default() -> None:
    data = tomllib.loads(uncommented(example()))
    assert {(key.section, key.name): key.default for key in keys()} == {
        (section, name): value for section, table in data.items() for name, value in table.items()
    }


def test_every_line_of_the_example_fits() -> None:
    assert max(map(len, example().split("\n"))) <= 100


# --- Values -------------------------------------------------------------------------------------


def test_values_get_their_types() -> None:
    config = parse(
        dedent("""
            node.address = "2001:db8::1"
            network.subnet_v4 = "10.18.0.0/26"
            workers.cpus = [1, 0]
            tables.static = "/tmp/tables.json"
        """),
        "f",
    )
    assert config.node.address == ip_address("2001:db8::1")
    assert config.network.subnet_v4 == IPv4Network("10.18.0.0/26")
    assert config.network.subnet_v6 == ""
    assert config.workers.cpus == (1, 0)
    assert config.tables.static == Path("/tmp/tables.json")


def test_what_is_in_force_reads_back_as_the_same() -> None:
    config = parse('node.address = "192.0.2.1"\nnetwork.subnet_v6 = "fc00::/120"\nworkers.cpus = [1]', "f")
    text = in_force(config)
    assert parse(text, "f") == config
    assert 'subnet_v6 = "fc00::/120"  # default ""' in text.split("\n")
    assert "mtu = 1450" in text.split("\n")


def test_a_configuration_does_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().tunnel.port = 1  # type: ignore[misc]


def test_the_schema_says_unit_and_reloadable_of_every_key() -> None:
    definitions = schema()["$defs"].values()
    stated = {name: field for table in definitions for name, field in table["properties"].items()}
    assert len(definitions) == len({key.section for key in keys()})
    for key in keys():
        assert stated[key.name].keys() >= {"default", "description", "unit", "reloadable"}


# --- Differences --------------------------------------------------------------------------------


def test_differences_name_what_changed() -> None:
    new = parse('log.level = "debug"\ntunnel.port = 1', "f")
    found = [(change.key, change.old, change.new) for change in differences(Config(), new)]
    assert found == [("tunnel.port", 50103, 1), ("log.level", "info", "debug")]
    assert differences(new, new) == []


def test_the_keys_that_a_reload_applies() -> None:
    reloadable = [key.dotted for key in keys() if is_reloadable(key.dotted)]
    firewall = ["firewall.egress", "firewall.uplinks", "firewall.accept"]
    flow_log = [f"flowlog.{name}" for name in ("enabled", "sample", "rate", "file")]
    others = [*firewall, "tables.static", "health.commands", *flow_log, "log.level"]
    assert [it for it in reloadable if not it.startswith("naming.")] == others
    fixed = [key.name for key in keys() if key.section == "naming" and not key.reloadable]
    assert fixed == ["enabled", "port", "mdns", "user"]


# --- Errors -------------------------------------------------------------------------------------

WRONG = {
    "a number out of range": (
        "[tunnel]\n# a comment\nport = 70000",
        "f:3: tunnel.port: expected an integer from 1 to 65535, got 70000",
    ),
    "a string that looks like a number": (
        '[tunnel]\nport = "50103"',
        'f:2: tunnel.port: expected an integer from 1 to 65535, got "50103"',
    ),
    "a number where a switch is meant": (
        "offload.tun_tso = 1",
        "f:1: offload.tun_tso: expected true or false, got 1",
    ),
    "an unknown word": (
        'log.level = "loud"',
        'f:1: log.level: expected one of "debug", "info", "warning", "error", got "loud"',
    ),
    "a misspelt key": (
        "[workers]\ncuont = 1",
        "f:2: workers.cuont: expected a known key (did you mean workers.count?), got 1",
    ),
    "a misspelt section": (
        "\n[wokers]\ncount = 1",
        'f:2: wokers: expected a known key (did you mean workers?), got {"count": 1}',
    ),
    "a key of another section": (
        "[workers]\nmtu = 1400",
        "f:2: workers.mtu: expected a known key (did you mean tunnel.mtu?), got 1400",
    ),
    "a key like no other": (
        "[paths]\nqqq = 1",
        "f:2: paths.qqq: expected a known key (runtime, state, cache), got 1",
    ),
    "a key outside of any section": (
        "mtu = 1400",
        "f:1: mtu: expected a known key (did you mean tunnel.mtu?), got 1400",
    ),
    "a value where a section is meant": ("log = 1", "f:1: log: expected a table [log], got 1"),
    "an array of tables where a section is meant": (
        "[[log]]\nlevel = 'info'",
        'f:1: log: expected a table [log], got [{"level": "info"}]',
    ),
    "an element of an array over several lines": (
        '[network]\noverlay = [\n  "10.16.0.0/12",\n\n  # why\n  "fc00::",\n]',
        'f:6: network.overlay[1]: expected a network such as 10.18.0.0/26 or fc00::/120, got "fc00::"',
    ),
    "a network with host bits": (
        'network.subnet_v4 = "10.18.0.5/26"',
        'f:1: network.subnet_v4: expected a network without host bits (10.18.0.0/26), got "10.18.0.5/26"',
    ),
    "a subnet of the other family": (
        'network.subnet_v4 = "fc00::/120"',
        'f:1: network.subnet_v4: expected an IPv4 network such as 10.18.0.0/26, or "", got "fc00::/120"',
    ),
    "a number where a network is meant": (
        "network.services = [5]",
        "f:1: network.services[0]: expected a network such as 10.18.0.0/26 or fc00::/120, got 5",
    ),
    "an interface name that the kernel would cut": (
        'network.tun = "sixteen-letters-"',
        "f:1: network.tun: expected an interface name of 1 to 15 letters, digits, '_', '-' or '.', "
        'got "sixteen-letters-"',
    ),
    "an interface name that the kernel takes as a template": (
        'network.tun = "edge%d"',
        "f:1: network.tun: expected an interface name of 1 to 15 letters, digits, '_', '-' or '.', got \"edge%d\"",
    ),
    "an address that is none": (
        'node.address = "192.0.2"',
        'f:1: node.address: expected "auto" or an IP address such as 192.0.2.1, got "192.0.2"',
    ),
    "an address that no other node can reach": (
        'node.address = "127.0.0.1"',
        'f:1: node.address: expected an address that other nodes can reach, got "127.0.0.1"',
    ),
    "a node id in capitals": (
        'node.id = "0123456789ABCDEF01234567"',
        'f:1: node.id: expected 24 lower-case hexadecimal digits, or "", got "0123456789ABCDEF01234567"',
    ),
    "a relative path": (
        'paths.state = "state"',
        'f:1: paths.state: expected an absolute path, got "state"',
    ),
    "a socket path that the kernel would refuse": (
        f'api.socket = "/{"s" * 107}"',
        f'f:1: api.socket: expected an absolute path of at most 107 bytes, got "/{"s" * 57}…',
    ),
    "a date where a number is meant": (
        "tunnel.mtu = 2020-01-01",
        'f:1: tunnel.mtu: expected an integer from 1280 to 65000, got "2020-01-01"',
    ),
    "two interfaces of one name": (
        '[network]\nbridge = "edge0"\ntun = "edge0"',
        'f:3: network.tun: expected a name other than network.bridge, got "edge0"',
    ),
    "a subnet outside of the overlay": (
        'network.subnet_v4 = "192.168.0.0/24"',
        'f:1: network.subnet_v4: expected a subnet inside one of network.overlay, got "192.168.0.0/24"',
    ),
    "a subnet among the ServiceIPs": (
        'network.subnet_v6 = "fdff:0:1::/120"',
        "f:1: network.subnet_v6: expected a subnet that does not overlap network.services (fdff::/16), "
        'got "fdff:0:1::/120"',
    ),
    "a subnet without room": (
        'network.subnet_v4 = "10.18.0.0/31"',
        'f:1: network.subnet_v4: expected a subnet of /30 or larger (a gateway and a container), got "10.18.0.0/31"',
    ),
    "ServiceIPs that no route leads to": (
        'network.services = ["10.30.0.0/16",\n"192.168.0.0/16"]',
        'f:2: network.services[1]: expected a range inside one of network.overlay, got "192.168.0.0/16"',
    ),
    "ranges that overlap": (
        'network.overlay = ["10.16.0.0/12", "fc00::/7",\n"10.17.0.0/16"]',
        'f:2: network.overlay[2]: expected a range that does not overlap 10.16.0.0/12, got "10.17.0.0/16"',
    ),
    "an overlay of everything": (
        'network.overlay = ["0.0.0.0/0", "fc00::/7"]',
        'f:1: network.overlay[0]: expected a range that leaves room for the underlay, got "0.0.0.0/0"',
    ),
    "an underlay address inside the overlay": (
        'node.address = "10.20.0.1"',
        'f:1: node.address: expected an address outside network.overlay (10.16.0.0/12), got "10.20.0.1"',
    ),
    "a CPU that the machine has not": (
        "workers.cpus = [0,\n 2]",
        "f:2: workers.cpus[1]: expected a CPU of this machine (0 to 1), got 2",
    ),
    "a CPU twice": ("workers.cpus = [1, 1]", "f:1: workers.cpus[1]: expected each CPU once, got 1"),
    "a syntax error": (
        "[tunnel]\nport 5",
        "f:2: syntax: expected TOML, got expected '=' after a key in a key/value pair",
    ),
    "a key twice": (
        "[tunnel]\nport = 5\nport = 6",
        "f:3: syntax: expected TOML, got cannot overwrite a value",
    ),
    "an array without an end": (
        "workers.cpus = [\n1,\n",
        "f:3: syntax: expected TOML, got invalid value",
    ),
}


@pytest.mark.parametrize(("text", "line"), WRONG.values(), ids=WRONG)
def test_an_error_names_line_key_and_expectation(text: str, line: str) -> None:
    assert problems(text) == [line]


def wrong_values(key: Key) -> list[object]:
    """Values that are wrong for a key: other types, and what is just outside its range."""
    values: list[object] = [-1, 10**12, 0.5, "no such thing!", {}, [[]]]
    values += [] if isinstance(key.default, bool) else [True]
    return values


@pytest.mark.parametrize("key", list(keys()), ids=lambda key: key.dotted)
def test_every_wrong_value_of_every_key_is_one_line(key: Key) -> None:
    for value in wrong_values(key):
        text = "{}" if value == {} else json.dumps(value)
        found = problems(f"# a comment\n[{key.section}]\n\n{key.name} = {text}\n")
        assert len(found) == 1
        assert found[0].startswith(f"f:4: {key.dotted}")
        assert ": expected " in found[0]


def test_all_that_is_wrong_is_said_at_once_in_the_files_order() -> None:
    found = problems("[workers]\ncount = -1\n[tunnel]\nport = 0\nmut = 1\n[log]\nlevel = 5\n")
    assert [line.split(": ")[0] for line in found] == ["f:2", "f:4", "f:5", "f:7"]


def test_a_long_value_is_cut() -> None:
    (line,) = problems(f'log.level = "{"x" * 500}"')
    assert len(line) < 160
    assert line.endswith("…")


def test_without_a_machine_any_cpu_is_right() -> None:
    assert parse("workers.cpus = [900]", "f").workers.cpus == (900,)


def test_data_without_a_file_has_no_lines() -> None:
    with pytest.raises(ConfigError) as caught:
        from_data({"tunnel": {"port": 0}}, "--set")
    assert str(caught.value) == "--set: tunnel.port: expected an integer from 1 to 65535, got 0"


# --- Files --------------------------------------------------------------------------------------


def test_a_file_is_named_as_it_was_given(tmp_path: Path) -> None:
    path = tmp_path / "appliance.toml"
    path.write_text("\ntunnel.port = 0\n")
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(caught.value) == f"{path}:2: tunnel.port: expected an integer from 1 to 65535, got 0"


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none: file: expected a readable file, got No such file"):
        load(tmp_path / "none")


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a readable file, got Is a directory"):
        load(tmp_path)


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "appliance.toml"
    path.write_bytes(b"# fine\n# not \xff\n")
    with pytest.raises(ConfigError, match=r":2: syntax: expected UTF-8, got byte 0xff"):
        load(path)


def test_windows_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "appliance.toml"
    path.write_bytes(b"[tunnel]\r\n# x\r\nport = 0\r\n")
    with pytest.raises(ConfigError, match=r":3: tunnel\.port"):
        load(path)


# --- Lines --------------------------------------------------------------------------------------

LAYOUT = """\
top = 1
dotted.name = [1, 2]

[table]   # comment with [brackets] and "quotes"
text = '''
[not.a.table]
no_key = 1
'''
array = [ # first
  1, 2,
  # between ]
  "]", [3,
  4],
]
inline = { a = { b = 1 }, c = [5] }
"quoted.key" = 1
[table.sub]
key = 1
[[many]]
key = 1
[[many]]
key = 2
[many.sub]
key = 3
"""

PLACES = [
    (("top",), 1),
    (("dotted",), 2),
    (("dotted", "name"), 2),
    (("dotted", "name", 1), 2),
    (("table",), 4),
    (("table", "text"), 5),
    (("table", "array"), 9),
    (("table", "array", 0), 10),
    (("table", "array", 1), 10),
    (("table", "array", 2), 12),
    (("table", "array", 3), 12),
    (("table", "array", 3, 0), 12),
    (("table", "inline", "a", "b"), 15),
    (("table", "inline", "c", 0), 15),
    (("table", "quoted.key"), 16),
    (("table", "sub", "key"), 18),
    (("many", 0), 19),
    (("many", 0, "key"), 20),
    (("many", 1, "key"), 22),
    (("table", "absent"), 4),
    (("absent",), None),
]


@pytest.mark.parametrize(("loc", "line"), PLACES, ids=str)
def test_the_line_of_a_key(loc: tuple[str | int, ...], line: int | None) -> None:
    assert Lines(LAYOUT).of(loc) == line


SPACER = st.lists(st.sampled_from(["", "# comment", "  # [x]", '# """', "#]"]), max_size=2)


@given(st.lists(st.tuples(SPACER, st.integers(0, 4), st.booleans(), SPACER), max_size=8))
def test_lines_in_any_layout(statements: list[tuple[list[str], int, bool, list[str]]]) -> None:
    """Keys with arrays, in one line or one line an element, with comments between and inside."""
    text: list[str] = []
    expected: dict[tuple[str | int, ...], int] = {}
    for number, (before, size, spread, within) in enumerate(statements):
        text += before
        key = f"k{number}"
        expected[(key,)] = len(text) + 1
        if spread:
            text.append(f"{key} = [")
            for index in range(size):
                text += [*within, f'  "]{index}",']
                expected[(key, index)] = len(text)
            text.append("]")
        else:
            text.append(f"{key} = {list(range(size))}")
            expected |= {(key, index): len(text) for index in range(size)}
    lines = Lines("\n".join(text))
    assert {loc: lines.of(loc) for loc in expected} == expected
