"""What a store holds: every record and object with its size, and which objects each record reaches."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from edgebuild.store import Store


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """A record: its step, when it was last used (seconds since the epoch), its bytes, the objects that it reaches."""

    name: str
    used: float
    size: int
    objects: frozenset[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Inventory:
    """`objects`: sha256 → bytes. `broken`: keys of records that cannot be read, which no build takes."""

    records: dict[str, Held]
    objects: dict[str, int]
    broken: dict[str, int]

    @classmethod
    def of(cls, store: Store) -> Self:
        """Raises OSError where the store cannot be read."""
        records, broken = {}, {}
        for key, path in store.names("records"):
            found = os.lstat(path)
            record = store.record(key)
            if record is None:
                broken[key] = found.st_size
            else:
                reached = frozenset(store.reached(record))
                records[key] = Held(name=record.name, used=found.st_mtime, size=found.st_size, objects=reached)
        objects = {sha256: os.lstat(path).st_size for sha256, path in store.names("objects")}
        return cls(records=records, objects=objects, broken=broken)

    def reach(self, keys: Iterable[str]) -> set[str]:
        """The objects that these records reach and that are there."""
        found = set().union(*(self.records[key].objects for key in keys if key in self.records))
        return {sha256 for sha256 in found if sha256 in self.objects}

    def size(self, keys: Iterable[str]) -> int:
        """Bytes of these records and of all that they reach, each object once."""
        known = {key for key in keys if key in self.records}
        return sum(self.records[key].size for key in known) + sum(self.objects[one] for one in self.reach(known))

    def total(self) -> int:
        return sum(held.size for held in self.records.values()) + sum(self.objects.values()) + sum(self.broken.values())
