"""Peak memory of this process, from Linux' /proc. Standard library only.

Resident memory (RSS) = anonymous (heap, arenas, copies) + file-backed (mapped weights and libraries that were touched).
File-backed pages are counted as long as they are mapped and resident, although the kernel may drop them under pressure.
"""

from __future__ import annotations

import re
import threading
from pathlib import Path
from types import TracebackType

INTERVAL = 0.01  # seconds between two looks at anonymous memory; the kernel keeps the peak of RSS itself
STATUS = Path("/proc/self/status")


def now() -> dict[str, int]:
    """{"peak", "rss", "anonymous"} in bytes; peak is that of RSS since the last reset."""
    text = STATUS.read_text()
    found = {key: int(value) * 1024 for key, value in re.findall(r"^(VmHWM|VmRSS|RssAnon):\s+(\d+) kB", text, re.M)}
    return {"peak": found["VmHWM"], "rss": found["VmRSS"], "anonymous": found["RssAnon"]}


class Peak:
    """`with Peak() as peak:` then peak.rss, peak.anonymous (bytes, highest inside), peak.before (RSS at entry)."""

    rss = 0
    anonymous = 0
    before = 0

    def __enter__(self) -> Peak:
        if not STATUS.exists():
            raise SystemExit("memory is measured through /proc, which this system does not have")
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the current RSS
        self.before = now()["rss"]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._look()
        self._stop.set()
        self._thread.join()

    def as_dict(self) -> dict[str, int]:
        return {"peak_rss": self.rss, "peak_anonymous": self.anonymous, "rss_before": self.before}

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL):
            self._look()

    def _look(self) -> None:
        state = now()
        self.rss = max(self.rss, state["peak"])
        self.anonymous = max(self.anonymous, state["anonymous"])
