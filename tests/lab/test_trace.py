"""The sequence diagrams say what the lab's nodes and cluster say."""

import re

import pytest

from appliance.lab import lifecycle, trace
from appliance.lab.plan import Spec
from appliance.lab.trace import SCENES, Message, arrows, diagram
from tests.conftest import ROOT
from tests.lab.helpers import NOTHING, leftovers

DOCUMENT = ROOT / "docs" / "sequences.md"


def committed() -> dict[str, str]:
    """The diagrams of the document, by title."""
    found = re.findall(r"^## (.+?)\n.*?```mermaid\n(.*?)```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    return dict(found)


def test_what_is_said_twice_is_drawn_once_and_silent_participants_are_not_drawn() -> None:
    said = [Message(1.0, "node1", "cluster", "status online"), Message(2.0, "node1", "cluster", "status online")]
    asked = Message(3.0, "operator", "node1", "POST /v1/attachments", "->>")
    drawn = diagram([*said, asked])
    assert drawn.count("status online") == 1
    assert "node2" not in drawn
    assert arrows(drawn) == {("node1", "cluster", "status"), ("operator", "node1", "POST /v1/attachments")}


def test_every_scene_is_in_the_document() -> None:
    assert list(committed()) == [it.title for it in SCENES]


@pytest.mark.root
def test_a_registration_and_a_first_call_say_what_the_document_says() -> None:
    try:
        lab = lifecycle.up(Spec(trace.NAME, nodes=2, instances=1, workers=(1,)))
        played = {scene.title: diagram(said) for scene, said in trace.play(lab, SCENES[:2])}
    finally:
        lifecycle.down(trace.NAME)
    assert leftovers(trace.NAME) == NOTHING
    for title, drawn in played.items():
        assert arrows(drawn) == arrows(committed()[title]), title
