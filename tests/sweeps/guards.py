"""The guards that the sweeps are for, each as a function that switches it off in this process: the negative controls."""

import os
import shutil
from collections.abc import Callable
from typing import Any

from edgebuild import digest, files, process, run, store
from edgebuild.artifact import Artifact, Receipt
from edgebuild.fresh import Fresh, key_now, read_receipt
from edgebuild.run import Builder
from edgebuild.store import Store


def objects_under_a_temporary_name() -> None:
    def rename_in(self: Store, path: str, target: str) -> None:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        shutil.copyfile(path, target)
        os.unlink(path)

    Store._rename_in = rename_in  # type: ignore[method-assign]


def receipts_under_a_temporary_name() -> None:
    def write(path: str, data: bytes) -> None:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(data)

    run.write_whole = write  # type: ignore[attr-defined]


def outputs_under_a_temporary_name() -> None:
    def materialise(self: Store, artifact: Artifact, path: str, *, link: bool) -> None:
        self.remove(path)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if artifact.tree:
            for name, executable, sha256, _ in self.listing(artifact.digest):
                os.makedirs(os.path.dirname(f"{path}/{name}"), exist_ok=True)
                self._place(sha256, f"{path}/{name}", executable, link)
        else:
            self._place(artifact.digest, path, False, link)

    Store.materialise = materialise  # type: ignore[method-assign]


def folders_removed_under_a_temporary_name() -> None:
    def remove(self: Store, path: str) -> None:
        if os.path.lexists(path):
            self._remove(path)
        self._memo.forget(path)

    Store.remove = remove  # type: ignore[method-assign]


def objects_before_their_record() -> None:
    late: list[str] = []
    publish, keep = Store.publish, Store.keep

    def first_the_name(self: Store, path: str) -> Artifact:
        aside = f"{self.root}/tmp/{files.mine()}-late{len(late)}"
        os.rename(path, aside)
        late.append(aside)
        if os.path.isdir(aside):
            entries = sorted(self._memo.entries(aside))
            return Artifact(digest=digest.of_tree(entries), tree=True, size=sum(size for *_, size in entries))
        return Artifact(digest=self._memo.look(aside), tree=False, size=os.stat(aside).st_size)

    def then_what_it_names(self: Store, record: Any) -> None:
        keep(self, record)
        for path in late:
            publish(self, path)
            files.remove_tree(path)
        late.clear()

    Store.publish, Store.keep = first_the_name, then_what_it_names  # type: ignore[method-assign]


def outputs_before_their_receipt() -> None:
    deliver = Builder._deliver

    def early(self: Builder, step: Any, record: Any, before: Any) -> None:
        made = {name: (path, record.outputs[name].digest) for name, path in step.outputs.items()}
        receipt = Receipt(key=record.key, outputs=made, refused=record.refused)
        files.write_whole(step.receipt, receipt.to_bytes())
        deliver(self, step, record, receipt)

    Builder._deliver = early  # type: ignore[method-assign]


def receipts_list_what_is_to_come() -> None:
    listed = run._listed
    run._listed = lambda receipt: set() if receipt.endswith(".begun") else listed(receipt)


def outputs_held_against_their_receipt() -> None:
    def judge(self: Fresh, step: Any) -> bool:
        receipt = read_receipt(step.receipt)
        before = all(self(self._project.steps[name]) for name in step.after)
        return before and receipt is not None and not receipt.refused and receipt.key == key_now(self._project, step)

    Fresh._judge = judge  # type: ignore[method-assign]


def inputs_held_against_receipts() -> None:
    def inputs(self: Builder, step: Any, look: Any) -> dict[str, str]:
        return {role: look(path) for role, path in step.inputs.items()}

    Builder._inputs = inputs  # type: ignore[method-assign]


def hits_verified() -> None:
    Store.has = lambda self, artifact: os.path.exists(self.object(artifact.digest))  # type: ignore[method-assign]


def leftovers_collected() -> None:
    process.collect = lambda store: None


def scratch_removed() -> None:
    store.remove_tree = lambda path: None  # type: ignore[attr-defined]


def errors_of_fsync_heard() -> None:
    fsync = os.fsync

    def deaf(handle: int) -> None:
        try:
            fsync(handle)
        except OSError:
            pass

    os.fsync = deaf  # type: ignore[assignment]


def fsync_called() -> None:
    os.fsync = lambda handle: None  # type: ignore[assignment]


def errors_in_one_line() -> None:
    import time

    Builder.run = lambda self, step: self._run(step, time.monotonic())  # type: ignore[method-assign]


def groups_killed() -> None:
    process._kill_group = lambda pid: None


GUARDS: dict[str, Callable[[], None]] = {
    function.__name__: function
    for function in (
        objects_under_a_temporary_name,
        receipts_under_a_temporary_name,
        outputs_under_a_temporary_name,
        folders_removed_under_a_temporary_name,
        objects_before_their_record,
        outputs_before_their_receipt,
        receipts_list_what_is_to_come,
        outputs_held_against_their_receipt,
        inputs_held_against_receipts,
        hits_verified,
        leftovers_collected,
        scratch_removed,
        errors_of_fsync_heard,
        fsync_called,
        errors_in_one_line,
        groups_killed,
    )
}
