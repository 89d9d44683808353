"""A memory cgroup, of version 1 or 2, for the demos that run in a given memory."""

import os
import pathlib

CGROUPS = pathlib.Path("/sys/fs/cgroup")


class Cgroup:
    """A limit on the memory of the processes that join, page cache included. Raises OSError where none can be made."""

    def __init__(self, name, limit_bytes):
        unified = (CGROUPS / "cgroup.controllers").exists()
        parent = CGROUPS if unified else CGROUPS / "memory"
        self.path = parent / f"ferrozero-{name}-{os.getpid()}"
        self.peak = "memory.peak" if unified else "memory.max_usage_in_bytes"
        self.path.mkdir()
        limit = "memory.max" if unified else "memory.limit_in_bytes"
        (self.path / limit).write_text(str(limit_bytes))

    def join(self):
        (self.path / "cgroup.procs").write_text(str(os.getpid()))

    def peak_bytes(self):
        return int((self.path / self.peak).read_text())

    def remove(self):
        self.path.rmdir()
