"""A memory cgroup, of version 1 or 2, for the demos that run in a given memory."""

import os
import pathlib

CGROUPS = pathlib.Path("/sys/fs/cgroup")


class Cgroup:
    """A limit on the memory of the processes that join, page cache included. Raises OSError where none can be
    made.
    """

    def __init__(self, name, limit_bytes):
        unified = (CGROUPS / "cgroup.controllers").exists()
        parent = CGROUPS if unified else CGROUPS / "memory"
        self.path = parent / f"ferrozero-{name}-{os.getpid()}"
        self.peak = "memory.peak" if unified else "memory.max_usage_in_bytes"
        self.events = "memory.events" if unified else "memory.oom_control"
        self.path.mkdir()
        limit = "memory.max" if unified else "memory.limit_in_bytes"
        (self.path / limit).write_text(str(limit_bytes))

    def join(self):
        (self.path / "cgroup.procs").write_text(str(os.getpid()))

    def peak_bytes(self):
        return int((self.path / self.peak).read_text())

    def kills(self):
        """Processes that were killed because of the limit."""
        lines = (self.path / self.events).read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))

    def remove(self):
        self.path.rmdir()
