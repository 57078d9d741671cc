"""Port mappings as NodeEngines write them."""

import pytest

from appliance.environment import EnvironmentError_
from appliance.environment.portmap import PortMapping, parse


@pytest.mark.parametrize(
    ("text", "mappings"),
    [
        ("", ()),
        ("80", (PortMapping(80, 80, "tcp"),)),
        ("53/udp", (PortMapping(53, 53, "udp"),)),
        ("8080:80/tcp;5353:53/udp", (PortMapping(8080, 80, "tcp"), PortMapping(5353, 53, "udp"))),
        ("53;53/udp", (PortMapping(53, 53, "tcp"), PortMapping(53, 53, "udp"))),
        ("50103", (PortMapping(50103, 50103, "tcp"),)),
    ],
)
def test_what_a_text_means(text: str, mappings: tuple[PortMapping, ...]) -> None:
    assert parse(text, 50103) == mappings


@pytest.mark.parametrize(
    "text",
    [
        "80,81",
        "80:80-80",
        "80 ",
        "80;",
        ";",
        "web",
        "80/sctp",
        "80/TCP",
        "65536",
        "0",
        "80:0",
        "-1",
        "80:",
        "٨٠",
        "80\n",
        "80;80",
        "8080:80;8080:81",
        "50103/udp",
        "1:2:3",
    ],
)
def test_what_is_no_mapping(text: str) -> None:
    with pytest.raises(EnvironmentError_, match=r"^portMappings: expected "):
        parse(text, 50103)
