"""The HTTP interface: ours, and the words of existing clusters."""

import json
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from appliance.cli import main
from tests.manager.processes import ROOT, Manager, free_port

_numbers = count(1)


@pytest.fixture
def job() -> str:
    """A job name that no other test uses."""
    return f"rest.ns.srv{next(_numbers)}.test"


def body(job: str, **more: object) -> dict[str, object]:
    """A descriptor of a job."""
    return {**dict(zip(("app", "namespace", "service", "service_namespace"), job.split("."), strict=True)), **more}


def test_a_service_is_made_changed_shown_and_removed(manager: Manager, job: str) -> None:
    path = f"/v1/services/{job}"
    status, made = manager.call("PUT", path, body(job, instances=2))
    assert (status, made["name"], len(made["instances"])) == (201, job, 2)
    status, changed = manager.call("PUT", path, body(job, instances=3))
    assert (status, changed["instances"][:2]) == (200, made["instances"])
    assert manager.call("GET", path) == (200, changed)
    assert changed in manager.call("GET", "/v1/services")[1]["services"]
    assert manager.call("DELETE", path)[0] == 204
    assert manager.call("GET", path)[0] == manager.call("DELETE", path)[0] == 404


@pytest.mark.parametrize(
    ("wrong", "status", "words"),
    [
        ({"instances": "x"}, 400, 'instances: expected an integer from 0 to 10000, got "x"'),
        ({"app": "other"}, 400, "name: expected the name in the path"),
        ({"replicas": 1}, 400, "replicas: expected a known key"),
        ({"service_ips": {"rr": {"v4": "10.31.0.1"}}}, 409, "service_ips.rr.v4: expected an address in 10.30.0.0/16"),
    ],
)
def test_a_wrong_request_names_its_field(
    manager: Manager, job: str, wrong: dict[str, object], status: int, words: str
) -> None:
    answered, answer = manager.call("PUT", f"/v1/services/{job}", {**body(job), **wrong})
    assert answered == status
    assert words in answer["error"]
    assert manager.call("GET", f"/v1/services/{job}")[0] == 404


def test_a_body_that_is_no_json(manager: Manager, job: str) -> None:
    status, answer = manager.call("PUT", f"/v1/services/{job}", b"{")
    assert status == 400
    assert answer["error"].startswith("body: expected JSON")


def test_a_pinned_address_is_given_once(manager: Manager, job: str) -> None:
    pinned = {"service_ips": {"rr": {"v4": "10.30.200.1", "v6": "fdff:2000::200"}}}
    made = manager.deploy(job, 1, **pinned)
    assert made["service_ips"] == [
        {"policy": "rr", "v4": "10.30.200.1", "v6": "fdff:2000::200", "sticky": 0, "hash_port": False}
    ]
    other = "rest.ns.other.test"
    status, answer = manager.call("PUT", f"/v1/services/{other}", body(other, **pinned))
    assert (status, job in answer["error"]) == (409, True)
    manager.call("DELETE", f"/v1/services/{job}")
    assert manager.call("PUT", f"/v1/services/{other}", body(other, **pinned))[0] == 201


def test_a_service_of_a_thousand_instances(manager: Manager, job: str) -> None:
    made = manager.deploy(job, 1000)
    assert [it["number"] for it in made["instances"]] == list(range(1000))
    assert len({it["v4"] for it in made["instances"]} | {it["v6"] for it in made["instances"]}) == 2000
    assert manager.call("DELETE", f"/v1/services/{job}")[0] == 204


def test_existing_orchestrators_deploy_and_undeploy(manager: Manager, job: str) -> None:
    assert manager.call("POST", "/api/net/deployment", {"job_name": job}) == (200, "job stored succesfully")
    before = manager.service(job)
    assert len(before["instances"]) == 1
    assert manager.call("POST", "/api/net/deployment", {"job_name": job}) == (200, "job stored succesfully")
    assert manager.service(job) == before
    for _ in range(2):
        assert manager.call("DELETE", f"/api/net/deployment/{job}") == (200, "job removed succesfully")
    assert manager.call("GET", f"/v1/services/{job}")[0] == 404


def test_a_deployment_without_a_name_is_refused(manager: Manager) -> None:
    wrongs: tuple[object, ...] = ({}, {"job_name": None}, b"no json", [])
    for wrong in wrongs:
        assert manager.call("POST", "/api/net/deployment", wrong) == (400, "Invalid argument")
    status, answer = manager.call("POST", "/api/net/deployment", {"job_name": "three.parts.only"})
    assert (status, "job_name: expected" in answer["error"]) == (400, True)


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        ({}, (200, "update notification received")),
        ({"instance_number": -1}, (200, "update notification received")),
        ({"job_name": None}, (400, "Invalid Parameters")),
        ({"instance_number": -2}, (400, "Invalid instancenum")),
        ({"instance_number": "1"}, (400, "Invalid instancenum")),
        ({"type": "CHANGE"}, (400, "Invalid type")),
    ],
)
def test_job_updates(manager: Manager, job: str, change: dict[str, object], answer: tuple[int, str]) -> None:
    update = {"job_name": job, "instance_number": 0, "type": "DEPLOYMENT", **change}
    assert manager.call("POST", "/api/net/job/update", update) == answer


def test_jobs_by_name_and_address(manager: Manager, job: str) -> None:
    made = manager.deploy(job)
    assert manager.call("GET", f"/api/net/service/{job.replace('.', '_')}/instances")[1]["job_name"] == job
    for address in (made["service_ips"][0]["v4"].replace(".", "_"), made["instances"][0]["v6"]):
        assert manager.call("GET", f"/api/net/service/ip/{address}/instances")[1]["job_name"] == job
    assert manager.call("GET", "/api/net/service/a_b_c_d/instances") == (200, {})
    assert manager.call("GET", "/api/net/service/ip/10_30_99_99/instances") == (200, {})


def test_an_unknown_path_and_method(manager: Manager) -> None:
    assert manager.call("GET", "/v2/services")[0] == 404
    assert manager.call("PATCH", "/v1/services")[0] == 405


def test_health(manager: Manager) -> None:
    status, health = manager.call("GET", "/healthz")
    assert (status, health["ok"], health["broker"], health["mqtt"]) == (200, True, True, True)


# --- the commands -------------------------------------------------------------------------------


def command(url: str, *arguments: str) -> Result:
    """An `appliance …` that is told where the manager is."""
    return CliRunner().invoke(main, [*arguments, "--manager", url])


def test_deploy_services_and_undeploy(manager: Manager, tmp_path: Path, job: str) -> None:
    file = tmp_path / "service.yaml"
    file.write_text("".join(f"{key}: {value}\n" for key, value in body(job, instances=2).items()))
    deployed = command(manager.url, "deploy", str(file))
    assert (deployed.exit_code, deployed.stderr) == (0, "")
    assert deployed.stdout.splitlines()[0] == job
    assert deployed.stdout in command(manager.url, "services").stdout
    assert command(manager.url, "undeploy", str(file)).exit_code == 0
    gone = command(manager.url, "undeploy", job)
    assert (gone.exit_code, gone.stderr) == (1, f"appliance: service: expected a deployed service, got {job}\n")


def test_a_wrong_file_changes_nothing(manager: Manager, tmp_path: Path) -> None:
    file = tmp_path / "service.yaml"
    file.write_text("app: shop\n")
    refused = command(manager.url, "deploy", str(file))
    assert refused.exit_code == 1
    assert refused.stderr.splitlines()[0] == f"{file}:1: namespace: expected a value, got nothing"


def test_no_manager() -> None:
    silent = command(f"http://127.0.0.1:{free_port()}", "services")
    assert silent.exit_code == 1
    assert silent.stderr.startswith("appliance: no answer from the cluster service manager at 127.0.0.1:")


def test_the_manager_does_without_the_packet_path() -> None:
    """It also runs where there is no numba, and starts in a second."""
    probe = (
        "import sys, appliance.cluster.manager.cli, appliance.cluster.manager.manager; print('numba' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=20, cwd=ROOT)
    assert done.stdout == "False\n"


def test_deploy_says_beforehand_what_it_would_change(manager: Manager, job: str, tmp_path: Path) -> None:
    file, other = tmp_path / "one.yaml", tmp_path / "two.yaml"
    file.write_text(json.dumps(body(job, instances=2)))
    other.write_text(json.dumps(body(job, exposed=[{"port": 81}])))

    def said(*arguments: str) -> Result:
        return CliRunner().invoke(main, [*arguments, "--manager", manager.url])

    first = said("deploy", "-f", str(file), "--dry-run")
    assert (first.exit_code, first.output.splitlines()[:2]) == (0, [job, "  + instances: 2"])
    assert manager.call("GET", f"/v1/services/{job}")[0] == 404
    assert said("diff", "-f", str(file)).exit_code == 1
    assert said("deploy", "-f", str(file)).exit_code == 0
    same = said("diff", str(file))
    assert (same.exit_code, same.output) == (0, "nothing would change\n")
    changed = said("diff", str(other))
    assert (changed.exit_code, changed.output.splitlines()) == (
        1,
        [job, "  ~ instances: 2 -> 1", '  + exposed: [{"port": 81}]'],
    )
    assert said("undeploy", str(file)).exit_code == 0


def test_the_schema_is_printed_without_a_manager() -> None:
    printed = CliRunner().invoke(main, ["deploy", "--schema"])
    assert json.loads(printed.output)["title"] == "Descriptor"


def test_an_instance_that_leaves_drains_first(manager: Manager, job: str) -> None:
    """Removed by the manager, once its time is over; one that never ran goes at once."""
    manager.call("PUT", f"/v1/services/{job}", body(job, instances=2, drain=0.5))
    assert manager.call("PUT", f"/v1/services/{job}", body(job, instances=1, drain=0.5))[0] == 200
    assert len(manager.service(job)["instances"]) == 1
