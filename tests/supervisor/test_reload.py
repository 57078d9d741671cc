"""Every key that is said to be reloadable is, and every other one is refused, without any change."""

import json
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from appliance import config as configuration
from appliance.client import ApiError
from appliance.config import Config, Key, keys
from appliance.config_text import in_force
from appliance.supervisor.errors import StartError
from appliance.supervisor.main import _check_reloadable
from appliance.supervisor.naming import Naming
from tests.supervisor.test_handover import alone
from tests.supervisor.world import World, until

OTHER: dict[str, Any] = {
    "firewall.egress": False,
    "firewall.uplinks": ["up0"],
    "firewall.accept": False,
    "tables.static": "/etc/other.json",
    "naming.zone": "other.example",
    "naming.extra_zones": ["more.example"],
    "naming.ttl": 7,
    "naming.ttl_down": 7,
    "naming.ttl_negative": 7,
    "naming.when_down": "nodata",
    "naming.cluster_wait": 7,
    "naming.upstreams": ["192.0.2.53"],
    "naming.upstream_timeout": 7,
    "naming.cache": 7,
    "health.commands": True,
    "flowlog.enabled": True,
    "flowlog.sample": 7,
    "flowlog.rate": 7,
    "flowlog.file": "/tmp/other",
    "log.level": "debug",
}
"""Another value of each reloadable key."""


def with_other(*names: str) -> Config:
    document: dict[str, dict[str, Any]] = {}
    for name in names:
        section, _, key = name.partition(".")
        document.setdefault(section, {})[key] = OTHER[name]
    return Config.model_validate(document)


def changes(key: Key) -> list[configuration.Change]:
    return [configuration.Change(key.dotted, "old", "new")]


def test_the_list_above_is_complete() -> None:
    assert {it.dotted for it in keys() if it.reloadable} == OTHER.keys()


@pytest.mark.parametrize("key", [it for it in keys() if not it.reloadable], ids=lambda it: it.dotted)
def test_other_keys_say_that_they_need_a_restart(key: Key) -> None:
    with pytest.raises(StartError, match=rf"{re.escape(key.dotted)}.*restart"):
        _check_reloadable(changes(key))


@pytest.mark.parametrize("key", [it for it in OTHER if it.startswith(("naming.", "log."))])
def test_the_resolver_is_told_of_each_of_its_keys(key: str) -> None:
    naming = Naming.__new__(Naming)
    naming._environment = SimpleNamespace(subnets=())  # type: ignore[assignment]
    said = []
    for config in (Config(), with_other(key)):
        naming._config = config
        said.append(naming._settings())
    assert said[0] != said[1]


@pytest.mark.root
def test_all_of_them_at_once_and_a_wrong_file(hub: World, tmp_path: Path) -> None:
    node = alone(hub).start()
    until(lambda: node.api.status()["naming"]["ready"], "the resolver answers")
    file, resolver = node.directory / "appliance.toml", node.api.status()["naming"]["pid"]
    first = file.read_text()

    file.write_text(first.replace("[naming]", "[naming]\nno_such_key = 1", 1))
    with pytest.raises(ApiError, match="no_such_key"):
        node.api.reload()
    assert "no_such_key" in node.api.status()["node"]["last_error"]
    file.write_text(in_force(Config.model_validate(tomllib.loads(first) | {"node": {"address": "192.0.2.77"}})))
    with pytest.raises(ApiError, match=r"node\.address.*restart"):
        node.api.reload()

    instance = {"instance_number": 0, "namespace_ip": "10.18.0.9", "host_ip": "192.0.2.1", "host_port": 50103}
    static = tmp_path / "static.json"
    static.write_text(json.dumps([{"app_name": "app.ns.web.test", "instance_list": [{**instance, "service_ip": []}]}]))
    OTHER["tables.static"], OTHER["flowlog.file"] = str(static), str(tmp_path / "flows")
    raw = tomllib.loads(first)
    for name, value in OTHER.items():
        section, _, key = name.partition(".")
        raw.setdefault(section, {})[key] = value
    file.write_text(in_force(Config.model_validate(raw)))
    rules = node.namespace.command("nft", "list", "ruleset")
    assert OTHER.keys() <= set(node.api.reload())
    assert node.namespace.command("nft", "list", "ruleset") != rules
    assert node.api.status()["node"]["last_error"] == ""
    assert node.api.status()["flow_log"]["enabled"]
    assert [it["address"] for it in node.api.hosts()] == ["10.18.0.9"]
    until(lambda: node.api.status()["naming"]["pid"] != resolver, "the zone is not mDNS' any more")
    until(lambda: node.api.status()["naming"]["ready"], "the resolver answers again")
    explained = node.api.name("web.test.app.ns.other.example")
    assert explained["from"] != "upstream", explained
