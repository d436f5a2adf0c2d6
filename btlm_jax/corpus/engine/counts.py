"""What a task counts: documents and bytes in and out by source, and lengths."""

from __future__ import annotations

from collections import Counter

from btlm_jax.corpus.readers.records import Record


class DocumentCounts:
    """Counts of one task."""

    def __init__(self):
        self._read: dict[str, Counter] = {}
        self._written: dict[str, Counter] = {}
        self._lengths: Counter = Counter()
        self._num_changed = 0

    def count_read(self, record: Record) -> None:
        """Count a document that was read."""
        _add(self._read, record)

    def count_changed(self, is_changed: bool) -> None:
        """Count a document whose text the stage changed."""
        self._num_changed += is_changed

    def count_written(self, record: Record) -> None:
        """Count a document that was written."""
        _add(self._written, record)
        self._lengths[str(1 << max(len(record.text) - 1, 0).bit_length())] += 1

    def totals(self, *, dropped: Counter, bad: Counter) -> dict:
        """Return the counts for a manifest; `lengths` has documents by their characters, rounded up to a power of 2."""
        return {
            "read": {source: dict(count) for source, count in self._read.items()},
            "written": {source: dict(count) for source, count in self._written.items()},
            "lengths": dict(self._lengths),
            "changed": self._num_changed,
            "dropped": dict(dropped),
            "bad": dict(bad),
        }


def _add(counts: dict[str, Counter], record: Record) -> None:
    count = counts.setdefault(record.source, Counter())
    count["documents"] += 1
    count["bytes"] += record.num_bytes
