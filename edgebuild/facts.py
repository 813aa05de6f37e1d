"""What a model that lies on this machine is, known before anything runs: by what `fetch` and `assess` themselves look at."""

import os
from collections.abc import Mapping
from pathlib import Path

from edgebuild import assess, source
from edgebuild.backend import ModelFacts
from edgebuild.step import Action


def facts_of(files: Mapping[str, Path]) -> ModelFacts:
    """By role, as `source.find` gives them. Raises StepFailed where a build would refuse the source."""
    source.run(Action(verb="fetch", backend="", params={}, inputs=files, outputs={"source": Path(os.devnull)}))
    return assess.assess(files)
