"""A Dockerfile's instructions, and what is wrong with them."""

import re
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[2]
PATH = ROOT / "k8s" / "image" / "Dockerfile"


@dataclass(frozen=True)
class Instruction:
    name: str
    text: str
    stage: int


def instructions(text: str) -> list[Instruction]:
    """In order, continued lines joined, without comments."""
    found, stage = [], 0
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    for line in re.sub(r"\\\n", " ", lines).splitlines():
        if line.strip():
            name, _, rest = line.strip().partition(" ")
            stage += name.upper() == "FROM"
            found.append(Instruction(name.upper(), rest.strip(), stage))
    return found


def pip_commands(text: str) -> list[str]:
    """Every `pip install` of its RUN steps."""
    runs = [i.text for i in instructions(text) if i.name == "RUN"]
    return [part.strip() for run in runs for part in run.split("&&") if " install " in part and "/pip " in part]


def ignored(path: str, text: str) -> bool:
    """Whether a .dockerignore keeps a path of the first level out of the build."""
    kept = True
    for line in text.splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!")
            if fnmatch(path, pattern):
                kept = line.startswith("!")
    return not kept


def lint(text: str) -> list[str]:
    """What a reviewer would not let pass."""
    found: list[str] = []
    every = instructions(text)
    arguments = {a.partition("=")[0]: a.partition("=")[2] for i in every if i.name == "ARG" for a in [i.text]}
    stages: set[str] = set()
    for one in every:
        if one.name == "FROM":
            image, _, name = one.text.partition(" AS ")
            inner = image in stages or (image == "${VARIANT}" and {"cpu", "cuda"} <= stages)
            if (
                not inner
                and not image.endswith(("@${BASE_DIGEST}",))
                and not re.search(r"@sha256:[0-9a-f]{64}$", image)
            ):
                found.append(f"FROM {image}: is not pinned by a digest")
            stages.add(name)
        if one.name == "ADD":
            found.append(f"ADD {one.text}: COPY is for files, and nothing is fetched by a URL")
        if one.name == "HEALTHCHECK":
            found.append("HEALTHCHECK: KubeRay has probes of its own")
        if one.name == "WORKDIR" and not one.text.startswith("/"):
            found.append(f"WORKDIR {one.text}: is not absolute")
        if one.name in ("ENV", "ARG") and re.search(r"(?i)(secret|token|password|access_key)", one.text):
            found.append(f"{one.name} {one.text}: looks like a secret, which would stay in the image")
        if one.name == "COPY" and re.search(r"(^|\s)\.\s", one.text):
            found.append("COPY .: brings whatever lies about")
        if one.name == "RUN":
            found += _of_run(one.text)
    if arguments.get("BASE_DIGEST") not in ("", None):
        found.append("ARG BASE_DIGEST: a default goes out of date")
    if ":" not in arguments.get("BASE", "") or arguments["BASE"].endswith(":latest"):
        found.append("ARG BASE: has no tag that says which")
    users = [i.text.split(":")[0] for i in every if i.name == "USER" and i.stage == every[-1].stage]
    if not users or not users[-1].isdigit() or users[-1] == "0":
        found.append("USER: the image runs as root, or as a name that runAsNonRoot cannot check")
    copied = next((n for n, i in enumerate(every) if i.name == "COPY" and "constraints.txt" in i.text), len(every))
    installed = next((n for n, i in enumerate(every) if i.name == "RUN" and "/pip " in i.text), len(every))
    if copied > installed:
        found.append("COPY constraints.txt: comes after the first pip install")
    if "PIP_NO_CACHE_DIR=1" not in text:
        found.append("pip: keeps its cache in the image")
    return found


def _of_run(text: str) -> list[str]:
    found = []
    if "apt-get install" in text:
        for needed in ("apt-get update", " -y ", "--no-install-recommends", "rm -rf /var/lib/apt/lists/*"):
            if needed not in text:
                found.append(f"RUN apt-get install: lacks {needed.strip()}")
    for part in text.split("&&"):
        if "pip install" in part and " -c constraints.txt " not in part:
            found.append(f"RUN {part.strip()}: is not held by constraints.txt")
    if re.search(r"\b(sudo|curl|wget|ssh)\b", text):
        found.append(f"RUN {text}: fetches or does what a build should not")
    if "|" in text.replace("||", ""):
        found.append(f"RUN {text}: a pipe hides a failure")
    return found
