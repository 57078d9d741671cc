"""Which node of which cluster this is: from the configuration, or as a NodeEngine registered it.

A registration is kept in ``paths.state``: the NodeEngine says it once, at its own start, and this appliance may be
restarted after that. It then joins again by itself. A registration that is only remembered gives way to the first one
that a NodeEngine makes, as it may have got another id meanwhile.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from appliance import config as configuration
from appliance.cluster.store import write
from appliance.config import Config, ConfigError

log = logging.getLogger(__name__)

FILE = "registration.json"


@dataclass(frozen=True)
class Identity:
    """A node's id, and the broker's host or URL; empty: that of the configuration."""

    node: str
    broker: str = ""

    def configure(self, config: Config, source: str) -> Config:
        """The configuration of this node in its cluster. Raises ConfigError; ``source`` is named in it."""
        data = config.model_dump()
        data["node"]["id"] = self.node
        if self.broker:
            data["cluster"]["url"] = self.broker
        return configuration.from_data(data, source)


def configured(config: Config) -> Identity | None:
    """The identity that the configuration gives; None if it leaves the id or the broker open."""
    return Identity(config.node.id) if config.node.id and config.cluster.url else None


def remembered(config: Config) -> Identity | None:
    """The registration of an earlier process, if the configuration does not contradict it."""
    path = config.paths.state / FILE
    try:
        data = json.loads(path.read_bytes())
        identity = Identity(str(data["node"]), str(data["broker"]))
        identity.configure(config, str(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, ConfigError) as error:
        log.warning("expected a registration that was saved here", extra={"path": str(path), "error": str(error)})
        return None
    return identity if config.node.id in ("", identity.node) else None


def remember(directory: Path, identity: Identity) -> None:
    """Keeps a registration for the next start. A disk that takes nothing costs only that."""
    try:
        write(directory / FILE, json.dumps({"node": identity.node, "broker": identity.broker}).encode())
    except OSError as error:
        log.warning("cannot keep the registration", extra={"path": str(directory), "error": str(error)})
