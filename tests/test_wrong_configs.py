"""A hundred wrong files and more, made from the schema: each gets one line that names the key, and no traceback."""

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from appliance.cli import main
from appliance.config import Key, keys
from appliance.config_text import schema, toml_value


def properties() -> dict[str, dict[str, Any]]:
    """What the schema says of each key."""
    made = schema()
    found: dict[str, dict[str, Any]] = {}
    for section, reference in made["properties"].items():
        model = made["$defs"][reference["$ref"].rsplit("/", 1)[1]]
        found |= {f"{section}.{name}": it for name, it in model["properties"].items()}
    return found


def wrong_values(key: Key, said: dict[str, Any]) -> list[object]:
    """What the schema excludes: other types, beyond the range, none of the enumeration."""
    kind = said.get("type", "")
    others: dict[str, list[object]] = {
        "integer": ["1", 1.5, True, [1]],
        "boolean": [1, "true", []],
        "string": [1, True, ["x"]],
        "array": [1, "x", [True], {"a": 1}],
    }
    values = others.get(kind, [1 << 62, True, [[]]])
    values += [said["minimum"] - 1] if "minimum" in said else []
    values += [said["maximum"] + 1] if "maximum" in said else []
    values += ["\x01none of these"] if "enum" in said else []
    return [it for it in values if it != key.default or type(it) is not type(key.default)]


def text(value: object) -> str:
    """A value in TOML."""
    return "{ a = 1 }" if isinstance(value, dict) else toml_value(value)


SAID = properties()
CASES = [(key.dotted, text(value)) for key in keys() for value in wrong_values(key, SAID[key.dotted])]


def test_there_are_more_than_a_hundred_and_one_for_every_key() -> None:
    assert len(CASES) > 100
    assert {key for key, _ in CASES} == {key.dotted for key in keys()}


@pytest.mark.parametrize(
    ("command", "step"), [(["config", "check"], 1), (["config", "show", "-c"], 20), (["run", "-c"], 20)], ids=str
)
def test_each_gets_one_clear_line(command: list[str], step: int, tmp_path: Path) -> None:
    file = tmp_path / "appliance.toml"
    for key, value in CASES[::step]:
        section, name = key.split(".")
        file.write_text(f"# wrong\n[{section}]\n{name} = {value}\n")
        result = CliRunner().invoke(main, [*command, str(file)])
        lines = result.output.splitlines()
        assert result.exit_code == 1, (key, value)
        assert isinstance(result.exception, SystemExit), (key, value, result.exception)
        assert len(lines) == 1, (key, value, lines)
        assert lines[0].startswith(f"{file}:3: {key}"), (key, value, lines)
        assert ": expected " in lines[0], lines
        assert ", got " in lines[0], lines
        assert "Traceback" not in result.output


@pytest.mark.parametrize(
    "content",
    ["[", "a = ", "x = 1", "[no]", "[tunnel]\nprot = 1", "tunnel = 1", "[tunnel]\n[tunnel]", "\x00", "[[tunnel]]"],
)
def test_what_is_no_configuration_at_all(content: str, tmp_path: Path) -> None:
    file = tmp_path / "appliance.toml"
    file.write_text(content)
    result = CliRunner().invoke(main, ["config", "check", str(file)])
    assert result.exit_code == 1
    assert len(result.output.splitlines()) == 1
    assert result.output.startswith(str(file))


@pytest.mark.parametrize(
    "line",
    [
        'url = "mqtt://me:hunter2@broker"',
        'url = "mqtts://me:hunter2@broker:8883/path"',
        'password = "hunter2"',
        'password_file = "hunter2"',
        'key = "-----BEGIN PRIVATE KEY-----\\nhunter2"',
        "certificate = \"""\n-----BEGIN PRIVATE KEY-----\nhunter2\n\"""",
        'Passphrase = ["hunter2"]',
        "password = hunter2",
        'login = { user = "me", token = "hunter2" }',
    ],
)
def test_a_secret_in_a_wrong_place_is_not_shown(line: str, tmp_path: Path) -> None:
    file = tmp_path / "appliance.toml"
    file.write_text(f"[cluster]\n{line}\n")
    result = CliRunner().invoke(main, ["config", "check", str(file)])  # an error is the same, wherever it is said
    assert result.exit_code == 1
    assert "expected" in result.output
    assert "hunter2" not in result.output
