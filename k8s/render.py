"""Writes the RayJobs and the RayCluster of k8s/, as `cluster.kuberay` makes them.

    python k8s/render.py [--image registry.example.org/imaml:TAG]

Where the data and the runs lie stands in the Secret imaml-s3, and Ray runs entry points by a shell: `$IMAML_BUCKET` is read there.
"""

from __future__ import annotations

import argparse
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cluster.kube_options import KubeOptions
from cluster.kuberay import CONFIG_FILE, Run, rayjob, to_yaml
from cluster.resources import Needs, quantity
from imaml_dist.config.load import load_config
from imaml_dist.config.load import to_yaml as config_text
from pipelines.submit import needs

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "pipelines" / "configs" / "glyphs.yaml"
DATA, RUN = "s3://$IMAML_BUCKET/data/glyphs", "s3://$IMAML_BUCKET/runs/glyphs"
TRAIN = f"imaml train {CONFIG_FILE} --set data.url={DATA} --run-dir {RUN}"
SWEEPS = "/var/imaml"
SWEEP = (
    f"imaml sweep /home/ray/pipelines/configs/sweep_lambda_cg.yaml --set base.data.url={DATA} --set base.run.device=cpu "
    f"--sweep-dir {SWEEPS}/lambda-cg"
)
IN_SECRET = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "IMAML_BUCKET")


def image() -> str:
    """Named after what must agree: our version and Ray's."""
    return f"registry.example.org/imaml:{version('imaml_dist')}-ray{version('ray')}-cpu"


def base(image_name: str) -> dict[str, dict[str, Any]]:
    """File of k8s/base/jobs -> manifest."""
    options = _options(image_name, memory="4Gi")
    config = load_config(CONFIG, ["run.device=cpu", "run.max_seconds=null"])
    text, alone = config_text(config), Needs(0, 0, 1)
    commands = {
        "prepare": (f"imaml prepare glyphs --out {DATA}", alone),
        "train": (TRAIN, needs(config, quantity(options.memory, "memory"))),
        "evaluate": (f"imaml evaluate {RUN} --split test --tasks 600", alone),
    }
    made = {name: _job(name, command, text, wanted, options) for name, (command, wanted) in commands.items()}
    made["sweep"] = _with_sweeps(_job("sweep", SWEEP, text, Needs(2, 2, 1), options))
    cluster = _job("dev", "", text, Needs(0, 2, 1), options)
    made["cluster"] = _staged(cluster | {"kind": "RayCluster", "spec": cluster["spec"]["rayClusterSpec"]}, "cluster")
    return {f"{name}.yaml": document for name, document in made.items()}


def gpu(image_name: str) -> dict[str, dict[str, Any]]:
    """File of k8s/overlays/gpu -> a patch that makes another job of the base's."""
    options = _options(
        image_name, memory="24Gi", shm="8Gi", head_cpus=4, head_memory="16Gi", node_selector={"imaml/pool": "gpu"}
    )
    # Eight chunks, one for every worker at most.
    config = load_config(
        CONFIG, ["run.device=cuda", "run.max_seconds=null", "run.workers={min: 2, max: 8}", "run.tasks_per_step=64"]
    )
    job = _job("train", TRAIN, config_text(config), needs(config, quantity(options.memory, "memory")), options)
    cluster = job["spec"]["rayClusterSpec"]
    (steady,) = cluster["workerGroupSpecs"]
    steady |= {"groupName": "gpu", "maxReplicas": 4}
    steady["template"]["spec"]["containers"][0]["env"].append({"name": "NCCL_DEBUG", "value": "WARN"})
    passing = deepcopy(steady) | {"groupName": "gpu-preemptible", "replicas": 0, "minReplicas": 0, "maxReplicas": 4}
    pod = passing["template"]["spec"]
    pod["nodeSelector"] = {"imaml/pool": "gpu-preemptible"}
    pod["tolerations"].append({"key": "imaml/preemptible", "operator": "Exists", "effect": "NoSchedule"})
    cluster["workerGroupSpecs"].append(passing)
    # The base's head has an account without rights; null takes it away, and KubeRay gives one to the autoscaler.
    cluster["headGroupSpec"]["template"]["spec"] |= {"serviceAccountName": None, "automountServiceAccountToken": None}
    return {"train.yaml": job}


def _options(image_name: str, **fields: Any) -> KubeOptions:
    secrets = {name: f"imaml-s3/{name}" for name in IN_SECRET}
    return KubeOptions(image=image_name, env={"MLFLOW_TRACKING_URI": "http://mlflow:5000"}, secrets=secrets, **fields)


def _job(name: str, command: str, config: str, wanted: Needs, options: KubeOptions) -> dict[str, Any]:
    made = rayjob(Run(name, (), config, wanted), options)
    made["spec"]["entrypoint"] = command
    return _staged(made, name)


def _with_sweeps(job: dict[str, Any]) -> dict[str, Any]:
    """A sweep is kept in a folder that all nodes see, a volume here: its trials are runs on several of them."""
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        pod["volumes"].append({"name": "sweeps", "persistentVolumeClaim": {"claimName": "sweeps"}})
        pod["containers"][0]["volumeMounts"].append({"name": "sweeps", "mountPath": SWEEPS})
    return job


def _staged(document: dict[str, Any], stage: str) -> dict[str, Any]:
    """With the label by which one of them is applied at a time."""
    metadata = document["metadata"]
    return {**document, "metadata": {**metadata, "labels": {**metadata["labels"], "imaml/stage": stage}}}


def write(folder: Path, image_name: str) -> None:
    """All of them, below a folder such as k8s."""
    for below, documents in (("base/jobs", base(image_name)), ("overlays/gpu", gpu(image_name))):
        (folder / below).mkdir(parents=True, exist_ok=True)
        for name, document in documents.items():
            head = "# Written by k8s/render.py; change that, or an overlay.\n"
            (folder / below / name).write_text(head + to_yaml(document), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", default=image())
    write(ROOT / "k8s", parser.parse_args().image)
