"""The configuration model as text: the example file, the configuration in force, the JSON schema."""

import json
from collections.abc import Iterator
from textwrap import wrap
from typing import Any

from appliance.config import Config, Key, Section, keys, sections

WIDTH = 100
"""Columns of the example file."""

HEADER = """\
Configuration of the edge appliance. Generated from appliance/config.py by `appliance config example`.

Every key is here with its default: remove the # before a key to change it. A key that is reloadable \
takes effect at `appliance reload`; the others need a restart. `appliance config check FILE` names \
the line and the expectation of whatever is wrong."""


def example() -> str:
    """The example file: every key with its default, what it does, its unit, and whether it is reloadable."""
    parts = ["\n".join(_comment(HEADER))]
    parts += ["\n".join(_example_section(name, model)) for name, model in sections().items()]
    return "\n\n".join(parts) + "\n"


def _example_section(name: str, model: type[Section]) -> Iterator[str]:
    yield f"[{name}]"
    yield from _comment(model.__doc__ or "")
    for key in keys():
        if key.section == name:
            yield ""
            yield from _comment(key.description)
            yield from _comment(_facts(key))
            yield f"#{key.name} = {toml_value(key.default)}"


def _facts(key: Key) -> str:
    """Default, unit, range and reloadability in one sentence."""
    unit = f" {key.unit}" if key.unit else ""
    when = "reloadable" if key.reloadable else "needs restart"
    return f"Default {toml_value(key.default)}{unit}; {key.expected}; {when}."


def _comment(text: str) -> Iterator[str]:
    """Comment lines; a blank line separates paragraphs."""
    for line in text.split("\n"):
        yield from (f"# {part}" for part in wrap(line, WIDTH - 2)) if line else ["#"]


def in_force(config: Config) -> str:
    """A configuration as a TOML file that reads back as the same, with a comment at what is not default."""
    dumped = config.model_dump(mode="json")
    lines: list[str] = []
    for key in keys():
        if f"[{key.section}]" not in lines:
            lines += ["", f"[{key.section}]"]
        value = dumped[key.section][key.name]
        changed = "" if value == key.default else f"  # default {toml_value(key.default)}"
        lines.append(f"{key.name} = {toml_value(value)}{changed}")
    return "\n".join(lines[1:]) + "\n"


def toml_value(value: object) -> str:
    """A string, integer, boolean or array of them in TOML, which writes these as JSON does, but for DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def schema() -> dict[str, Any]:
    """JSON schema (2020-12) of the file; `unit` and `reloadable` stand beside each key's type."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | Config.model_json_schema()
