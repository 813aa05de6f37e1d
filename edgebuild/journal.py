"""What every step of a run did: for the terminal, for `.edgebuild/last-run.json`, and for the exit status."""

import json
import os
import sys
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from edgebuild.errors import FAILED, FAULT, OK, USAGE
from edgebuild.files import write_whole
from edgebuild.noop import STATE

if TYPE_CHECKING:
    from edgebuild.run import Done


MADE = ("ran", "restored", "fresh")  # outcomes of a step that is true now


class Journal:
    """What every step did: for the terminal, for `.edgebuild/last-run.json`, and for the exit status."""

    def __init__(self) -> None:
        self._total = 0
        self._lock = threading.Lock()
        self._entries: dict[str, dict[str, Any]] = {}
        self._summaries: dict[str, str] = {}
        self._bad = self._fault = False
        self._display: Any = None

    def expect(self, steps: int) -> None:
        self._total = steps

    def started(self, name: str, more: bool = False) -> None:
        """`more`: a step that was not expected, because another one runs it."""
        with self._lock:
            if self._display is None:
                from edgebuild.progress import display

                self._display = display(self._total)
        if more:
            self.more()
        self._display.started(name)

    def more(self) -> None:
        """A step is to come that was not expected."""
        self._display.more()

    def tell(self, name: str, what: str) -> None:
        """Something about a step that runs or waits."""
        self._display.told(name, what)

    def doing(self, name: str, what: str) -> None:
        """How far a step is that runs long."""
        self._display.doing(name, what)

    def moved(self, name: str, here: int, total: int | None) -> None:
        """How many bytes of a download are here, of how many expected."""
        self._display.moved(name, here, total)

    def done(self, done: "Done") -> None:
        self._summaries[done.name] = done.summary
        self.ended(done.name, done.outcome, done.seconds, done.summary, done.reason)

    def ended(self, name: str, outcome: str, seconds: float, summary: str, reason: str = "it was not here") -> None:
        """A step of the plan, or one that a build makes for itself."""
        self._note(name, outcome, reason, seconds)
        self._display.ended(name, outcome, seconds, summary)

    def failed(self, name: str, message: str, seconds: float, fault: bool = False, told: str = "") -> None:
        """`told`: what the terminal shows in the place of the message."""
        self._note(name, "failed", message, seconds)
        self._fault |= fault
        self._display.failed(name, told or message, seconds)

    def refused(self, name: str, message: str, seconds: float) -> None:
        """One recipe of several that does not do: what tries it says what follows from that. Shown is why, and where its log lies."""
        self._note(name, "refused", message, seconds)
        self._display.ended(name, "refused", seconds, "\n".join(message.splitlines()[:2]))

    def bad(self, name: str, problem: str) -> None:
        """A target file that cannot be used: its message is shown once, whatever depends on it."""
        self._note(name, "failed", problem, 0.0)
        shown = self._bad
        self._bad = True
        if not shown or problem not in self._summaries.values():
            self._summaries[name] = problem
            print(problem, file=sys.stderr)

    def fresh(self, name: str) -> None:
        self._note(name, "fresh", "", 0.0)

    def blocked(self, name: str, reason: str) -> None:
        self._note(name, "blocked", reason, 0.0)

    def stays(self, target: str, problem: str) -> None:
        """What a target that is no more had made, and could not be removed."""
        self._note(f"build:{target}", "failed", problem, 0.0)
        print(f"  build:{target}: {problem}", file=sys.stderr)

    def status(self) -> int:
        if self._fault:
            return FAULT
        if self._bad:
            return USAGE
        return FAILED if any(entry["outcome"] in ("failed", "blocked") for entry in self._entries.values()) else OK

    def write(self, seconds: float, matrices: Iterable[str] = ()) -> None:
        """The terminal's last lines and last-run.json; `matrices`: the files of those that were asked for."""
        if self._display is not None:
            self._display.close()
        entries = [
            entry
            for entry in self._entries.values()
            if entry["name"].partition(":")[0] != "build" or entry["outcome"] == "failed"
        ]
        for name, summary in self._summaries.items():
            if name.startswith("build:") and self._entries[name]["outcome"] != "failed":
                self._deliver(name.partition(":")[2], summary)
        for path in matrices:
            if self._entries.get(f"agree:{os.path.basename(path).removesuffix('.json')}", {}).get("outcome") in MADE:
                self._agreement(path)
        write_last_run(entries, seconds)

    def _agreement(self, path: str) -> None:
        from edgebuild.agree import show

        with open(path, encoding="utf-8") as file:
            print(f"\n{show(json.load(file))}")

    def _deliver(self, target: str, summary: str) -> None:
        print(f"\n{target}: {summary}")
        try:
            with open(f"build/{target}/gate/verdicts.json", encoding="utf-8") as file:
                for gate in json.load(file):
                    print(f"  {gate_line(gate)}")
        except (OSError, ValueError, KeyError, TypeError):
            pass

    def _note(self, name: str, outcome: str, reason: str, seconds: float) -> None:
        self._entries[name] = {"name": name, "outcome": outcome, "reason": reason, "seconds": round(seconds, 3)}


def gate_line(gate: dict[str, Any]) -> str:
    """One gate for people: `kl_mean PASS 0.0065 (max 0.05)`."""
    value = "not measured" if gate["value"] is None else f"{gate['value']:.4g}"
    verdict = gate["verdict"] + (", waived" if gate.get("waived") else "")
    reason = f": {gate['reason']}" if gate["verdict"] != "PASS" and gate.get("reason") else ""
    return f"{gate['name']:<18} {verdict:<13} {value} ({gate['limit']}){reason}"


def write_last_run(entries: list[dict[str, Any]], seconds: float) -> None:
    """`.edgebuild/last-run.json`, and the last line of every run."""
    count = {outcome: sum(entry["outcome"] == outcome for entry in entries) for outcome in ("ran", "restored", "fresh", "failed")}
    try:
        write_whole(f"{STATE}/last-run.json", json.dumps({"seconds": round(seconds, 3), "steps": entries}).encode())
    except OSError as error:
        print(f"{STATE}/last-run.json cannot be written: {error.strerror}", file=sys.stderr)
    print(
        f"edgebuild: {count['ran']} ran, {count['restored']} restored, {count['fresh']} up to date, "
        f"{count['failed']} failed ({seconds:.1f} s)",
        flush=True,
    )
