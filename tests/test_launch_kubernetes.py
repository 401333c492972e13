"""The PyTorchJob: valid by its schema, and what it starts is what the two-node test runs."""

import json
import re
from pathlib import Path

import jsonschema
import pytest
from harness import ROOT
from launch_helpers import kubernetes_container, kubernetes_manifest

SCHEMA = json.loads((Path(__file__).parent / "fixtures/pytorchjob.schema.json").read_text())


def test_the_manifest_is_a_pytorchjob():
    jsonschema.validate(kubernetes_manifest(), SCHEMA)


def replica(manifest: dict) -> dict:
    return manifest["spec"]["pytorchReplicaSpecs"]["Master"]


def container(manifest: dict) -> dict:
    return replica(manifest)["template"]["spec"]["containers"][0]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda manifest: manifest.update(kind="Job"),
        lambda manifest: manifest["spec"].update(runpolicy={}),
        lambda manifest: manifest["spec"]["pytorchReplicaSpecs"].update(Chief={}),
        lambda manifest: replica(manifest).update(replicas="1"),
        lambda manifest: replica(manifest).update(restartPolicy="Sometimes"),
        lambda manifest: container(manifest).update(command="torchrun"),
        lambda manifest: container(manifest)["env"].append({"value": "1"}),
    ],
)
def test_the_schema_refuses(spoil):
    manifest = kubernetes_manifest()
    spoil(manifest)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(manifest, SCHEMA)


def test_the_manifest_agrees_with_itself_and_with_the_script():
    manifest = kubernetes_manifest()
    replicas = manifest["spec"]["pytorchReplicaSpecs"]
    assert replicas["Master"]["template"] == replicas["Worker"]["template"]
    pod = kubernetes_container()
    assert pod["name"] == "pytorch"
    environment = {entry["name"]: entry.get("value") for entry in pod["env"]}
    nodes = replicas["Master"]["replicas"] + replicas["Worker"]["replicas"]
    assert environment["NNODES"] == str(nodes)
    assert environment["RDZV_ENDPOINT"].startswith(f"{manifest['metadata']['name']}-master-0:")
    script = (ROOT / pod["command"][0]).read_text()
    documented = set(re.findall(r"^#   ([A-Z_]+) ", script, re.M))
    assert set(environment) <= documented
    for recipe in pod["args"][1::2]:
        assert (ROOT / recipe).exists()
    # The recipe's own folders are where the volumes are mounted.
    mounts = {mount["mountPath"] for mount in pod["volumeMounts"]}
    assert {f"{pod['workingDir']}/{folder}" for folder in ("data", "runs")} <= mounts


def test_the_manifest_asks_for_no_more_than_training_needs():
    pod = kubernetes_manifest()["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    (one,) = pod["containers"]
    assert one["securityContext"]["allowPrivilegeEscalation"] is False
    assert one["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert {"cpu", "memory", "nvidia.com/gpu"} <= set(one["resources"]["limits"])
    for volume in pod["volumes"]:
        assert "sizeLimit" in volume.get("emptyDir", {"sizeLimit": None})


def test_the_image_is_this_version():
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    assert kubernetes_container()["image"] == f"megatron-ttt:{version}"
