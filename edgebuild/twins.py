"""Steps of several targets that are the same work: the first of them does it, the others wait for that and take what it made."""

from collections.abc import Collection

from edgebuild.project import Project


def twins(project: Project, names: Collection[str]) -> dict[str, str]:
    """Of these steps, each that is the same work as an earlier one → that one.

    So where recipe and inputs are the same, and what no key holds: limits, where it downloads from, what it signs with. An input
    that a step makes is the same where its makers are twins; nothing is read for that. A gate costs nothing, and what it says
    stops its own target: it has none.
    """
    first: dict[object, str] = {}
    made: dict[str, object] = {}  # path → the work that makes it
    found = {}
    for step in project.steps.values():
        if step.name not in names or step.verb == "build":
            continue
        target = project.targets[project.owner(step)]
        given = [target[name] for name in ("memory", "time", "estimates")]
        given += [target["fetch"]] if step.verb == "fetch" else [target["sign"]] if step.verb == "package" else []
        inputs = tuple(sorted((role, made.get(path, path)) for role, path in step.inputs.items()))
        work = first.setdefault((step.recipe, inputs, repr(given)), step.name)
        made |= {path: f"{name} of {work}" for name, path in step.outputs.items()}
        if work != step.name and step.verb != "gate":
            found[step.name] = work
    return found
