"""The compose file of a container bundle, held against schemas/compose.json and against the Dockerfile that it builds by."""

import json
from pathlib import Path
from typing import Any

from edgebuild.bundles.dockerfile import instructions
from edgebuild.document import Document
from edgebuild.errors import StepFailed, TargetError

FILE = "compose.yaml"


def check(out: Path) -> None:
    """Raises StepFailed with everything in which it is not what this kind promises, or says otherwise than the Dockerfile."""
    try:
        document = Document(str(out / FILE), FILE)
        document.check("compose")
    except TargetError as error:
        raise StepFailed(f"{error}; correct the template") from error
    lines = instructions((out / "Dockerfile").read_text(encoding="utf-8"))
    said = dict(lines)  # the last of each counts
    for name, service in document.mapping()["services"].items():
        _agrees(name, service, said)


def _agrees(name: str, service: dict[str, Any], said: dict[str, str]) -> None:
    ports = {port.rpartition(":")[2] for port in service["ports"]}
    test = service["healthcheck"]["test"]
    if ports != {said.get("EXPOSE", "")}:
        raise StepFailed(
            f"{FILE}: {name} publishes port {', '.join(sorted(ports))}, and the image serves {said.get('EXPOSE') or 'none'}"
        )
    if service["user"] != said.get("USER"):
        raise StepFailed(f"{FILE}: {name} runs as {service['user']}, and the image as {said.get('USER')}")
    if test[1] != json.loads(said["ENTRYPOINT"])[0]:
        raise StepFailed(f"{FILE}: {name}: its health is asked by {test[1]}, which is not what the image runs by")
