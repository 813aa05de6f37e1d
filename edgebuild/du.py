"""`edgebuild du`: how many bytes of the store each target needs, alone and with others, and what nobody needs."""

import json
from collections import Counter
from dataclasses import asdict, dataclass

from edgebuild import provide, roots
from edgebuild.errors import shown
from edgebuild.inventory import Inventory
from edgebuild.project import Project
from edgebuild.units import human


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """Bytes that a target of this project needs: `own`, that nothing else needs, and `shared`, with any other target."""

    name: str
    own: int
    shared: int
    total: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Toolchain:
    """An environment in the user's cache, or wheels, or a base image: its `form`.

    `current`: its lock is one that this edgebuild ships; else gc removes it.
    """

    name: str
    form: str
    digest: str
    bytes: int
    current: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """`sum`: all targets of this project, what is shared counted once. `store`: all, needed by any project, to be freed.

    `toolchains` are the user's, beside the store.
    """

    targets: list[Share]
    sum: int
    store: dict[str, int]
    toolchains: list[Toolchain]
    unseen: list[str]  # projects that use the store and cannot be seen now: what they need is in `freed`


def usage(project: Project) -> Usage:
    """Raises OSError where the store or a project that uses it cannot be read."""
    with project.store.held():
        there = Inventory.of(project.store)
        known = roots.roots(project.store.root)
        needs = {root.folder: roots.needs(root) for root in known if root.state == roots.HERE}
    mine = needs[known[0].folder]
    users = Counter(one for targets in needs.values() for keys in targets.values() for one in _things(there, keys))
    needed = there.size(key for targets in needs.values() for keys in targets.values() for key in keys)
    return Usage(
        targets=[_share(there, name, mine.get(name, set()), users) for name in sorted({*project.names(), *mine})],
        sum=there.size(key for keys in mine.values() for key in keys),
        store={"bytes": there.total(), "needed": needed, "freed": there.total() - needed},
        toolchains=[
            Toolchain(name=one.name, form=one.form, digest=one.digest, bytes=one.bytes, current=current)
            for one, current in provide.kept()
        ],
        unseen=[root.name for root in known if root.state == roots.AWAY],
    )


def show(found: Usage, as_json: bool) -> str:
    """For people, a line a target; or as JSON, see schemas/du.json."""
    if as_json:
        return json.dumps(asdict(found), indent=1)  # in ASCII: a target's file may have any name
    rows = [("", "only it", "shared", "total")]
    rows += [(shown(share.name), human(share.own), human(share.shared), human(share.total)) for share in found.targets]
    rows.append(("all targets, shared counted once", "", "", human(found.sum)))
    lines = [f"{name:<32} {own:>10} {shared:>10} {total:>10}" for name, own, shared, total in rows]
    store = found.store
    lines.append(
        f"\nstore: {human(store['bytes'])}; receipts need {human(store['needed'])}, edgebuild gc would free {human(store['freed'])}"
    )
    lines += [
        f"{one.form} {one.name}: {human(one.bytes)}{'' if one.current else ', of another lock, which edgebuild gc removes'}"
        for one in found.toolchains
    ]
    lines += [f"{folder} uses this store too and cannot be seen now: gc frees nothing until it can" for folder in found.unseen]
    return "\n".join(lines)


def _share(there: Inventory, name: str, keys: set[str], users: "Counter[str]") -> Share:
    total = there.size(keys)
    own = sum(_bytes(there, one) for one in _things(there, keys) if users[one] == 1)
    return Share(name=name, own=own, shared=total - own, total=total)


def _things(there: Inventory, keys: set[str]) -> set[str]:
    """The records and objects that these keys need."""
    return (keys & there.records.keys()) | there.reach(keys)


def _bytes(there: Inventory, one: str) -> int:
    return there.records[one].size if one in there.records else there.objects[one]
