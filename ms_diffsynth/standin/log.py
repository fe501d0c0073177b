"""Reads the stand-in's log: what a run asked of the device, by kernel, copy, synchronisation and allocation."""
from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One operator that was launched."""

    name: str  # as CANN names it: "aclnnMatmul", or of the older path "AddN"
    path: str  # "aclnn" or "aclop"
    record: dict[str, Any] = field(repr=False)  # the line of the log

    def tensors(self) -> list[dict[str, Any]]:
        """The tensors among its arguments in order, lists opened: dtype, shape, and strides where not contiguous."""
        record = self.record
        found = record["arguments"] if self.path == "aclnn" else [*record["inputs"], *record["outputs"]]
        flat = [m for a in found for m in (a["list"] if isinstance(a, dict) and "list" in a else [a])]
        return [a for a in flat if isinstance(a, dict) and "shape" in a]

    def dtypes(self) -> tuple[str, ...]:
        """The dtypes of its tensors."""
        return tuple(t["dtype"] for t in self.tensors())


@dataclass(frozen=True)
class Log:
    """Events of a run in the order of their execution."""

    events: list[dict[str, Any]] = field(repr=False)

    @classmethod
    def read(cls, path: str | Path) -> Log:
        """Read a log; what was being written when the process was killed is left out."""
        events = []
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            try:
                events.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return cls(events)

    def between(self, begin: str, end: str) -> Log:
        """The entries between the first mark ``begin`` and the next mark ``end``.

        Raises: KeyError for an unknown mark.
        """
        marks = [(i, e["text"]) for i, e in enumerate(self.events) if e["event"] == "mark"]
        first = next((i for i, text in marks if text == begin), None)
        last = None if first is None else next((i for i, text in marks if i > first and text == end), None)
        if last is None:
            raise KeyError(f"the log has no mark '{begin if first is None else end}'; it has {[t for _, t in marks]}")
        return Log(self.events[first + 1:last])

    def marks(self) -> list[str]:
        """The texts of all marks."""
        return [e["text"] for e in self.events if e["event"] == "mark"]

    def kernels(self, path: str | None = None) -> list[Kernel]:
        """Launched operators, of one path or both."""
        return [Kernel(name=e["name"], path=e["path"], record=e) for e in self.events
                if e["event"] == "kernel" and path in (None, e["path"])]

    def counts(self, path: str | None = None) -> Counter[str]:
        """How often each operator was launched."""
        return Counter(kernel.name for kernel in self.kernels(path))

    def casts(self) -> int:
        """How many kernels only change a dtype."""
        return self.counts()["aclnnCast"] + self.counts()["Cast"]

    def transposes(self) -> int:
        """How many kernels only move data into another order of axes."""
        counts = self.counts()
        return sum(counts[name] for name in ("aclnnPermute", "aclnnTranspose", "Transpose", "TransposeD"))

    def copies(self) -> Counter[str]:
        """How many copies there were of each kind: "host to device", "device to host", "device to device"."""
        return Counter(e["kind"] for e in self.events if e["event"] == "copy")

    def synchronisations(self) -> int:
        """How often the host waited for the device."""
        return sum(e["event"] == "synchronise" for e in self.events)

    def allocated_peak(self) -> int:
        """The most bytes that were taken from the device at one time, by MindSpore's pool as a whole."""
        now = peak = 0
        for event in self.events:
            if event["event"] in ("allocate", "free"):
                now += event["bytes"] if event["event"] == "allocate" else -event["bytes"]
                peak = max(peak, now)
        return peak

    def errors(self) -> list[str]:
        """What the stand-in refused or could not do."""
        return [e["text"] for e in self.events if e["event"] == "error"]

    def summary(self) -> dict[str, Any]:
        """The counts of the whole log, for a table or a test."""
        return {"aclnn": len(self.kernels("aclnn")), "aclop": len(self.kernels("aclop")), "casts": self.casts(),
                "transposes": self.transposes(), "synchronisations": self.synchronisations(),
                "copies": dict(self.copies()), "allocated peak": self.allocated_peak()}
