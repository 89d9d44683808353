"""What the compare_*.py scripts share: measured processes that take turns, medians and tables."""

import argparse
import contextlib
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BINARY = ROOT / "target" / "release" / "ferrozero"
PEERS = "see the set-up commands at the head of this script (pip install torch, then deepspeed, into a venv)"

# The models of scale_demo and compare_scale.py: parameters, layers, width, heads.
SCALES = [("84 M", 12, 768, 12), ("302 M", 24, 1024, 16), ("1.2 G", 24, 2048, 16)]

# Libraries that spin after their parallel loops get this long to fall asleep before the next one's turn.
PAUSE_S = 0.2


class Unavailable(Exception):
    """A peer that can't be measured here, and why."""


def parser(description):
    """Options that every comparison has."""
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    options.add_argument("--rounds", type=int, default=5, help="measured turns of each")
    options.add_argument("--binary", type=Path, default=BINARY, help="the ferrozero to measure")
    options.add_argument("--json", action="store_true", help="write the result as JSON")
    options.add_argument("--verbose", action="store_true", help="show what the peers' libraries print")
    # Makes the script one of its own measured processes.
    options.add_argument("--serve-peer", help=argparse.SUPPRESS)
    return options


def parse(options):
    """The arguments, checked."""
    arguments = options.parse_args()
    if arguments.rounds < 1:
        options.error("--rounds must be at least 1")
    if not arguments.serve_peer and not os.access(arguments.binary, os.X_OK):
        options.error(f"{arguments.binary} is not there; build it with: cargo build --release")
    return arguments


def cpus():
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0))


def median(values):
    """Median, least and most."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def need(module):
    """Imports a peer's module."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # A broken installation raises all kinds.
        package = module.split(".")[0]
        reason = f"{type(error).__name__}: {error}"
        raise Unavailable(f"{package} can't be imported ({reason}); {PEERS}") from error


def peak_resident_bytes():
    """The most memory that this process had at once, as the kernel counts it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    return None


class Server:
    """A measured process: for each line of its input it does its work once and answers one line of JSON."""

    def __init__(self, name, command, environment=None, cgroup=None):
        self.name = name
        self.process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.messages(),
            text=True,
            env={**os.environ, **(environment or {})},
            preexec_fn=cgroup.join if cgroup else None,
        )

    def messages(self):
        """Where the process's messages go: the terminal."""
        return None

    def failed(self, reason):
        """The error for a process that went wrong."""
        return SystemExit(f"{self.name}: {reason}")

    def answer(self):
        """The next line of the process."""
        line = self.process.stdout.readline()
        if not line:
            raise self.failed(f"its process ended early, with status {self.process.wait()}")
        return json.loads(line)

    def ask(self, request):
        """Lets the process work once."""
        with contextlib.suppress(BrokenPipeError):  # The answer tells what happened.
            self.process.stdin.write(f"{request}\n")
            self.process.stdin.flush()
        return self.answer()

    def finish(self, last_answer=False):
        """Ends the process, after its last line of JSON if it writes one then."""
        self.process.stdin.close()
        answer = self.answer() if last_answer else None
        self.process.wait()
        return answer

    def kill(self):
        """Ends the process at once."""
        self.process.kill()
        self.process.wait()


class Peer(Server):
    """A comparison, by default this one again, as one of its peers. Answers {"value": ..} or {"unavailable":
    why}.
    """

    def __init__(self, name, peer, arguments, environment=None, command=None, cgroup=None):
        # The extensions that DeepSpeed builds at first use need ninja, which pip puts beside Python.
        path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
        self.verbose = arguments.verbose
        self.log = tempfile.TemporaryFile("w+", errors="replace")
        command = [*(command or [sys.executable, *sys.argv]), "--serve-peer", peer]
        super().__init__(name, command, {"PATH": path, **(environment or {})}, cgroup)
        try:
            self.versions = self.answer()
        except Unavailable:
            self.kill()
            raise

    def messages(self):
        return None if self.verbose else self.log

    def failed(self, reason):
        self.log.seek(0)
        last = self.log.read().strip().splitlines()[-1:]
        return Unavailable("; ".join([reason, *last, "--verbose shows more"]))

    def answer(self):
        answer = super().answer()
        if "unavailable" in answer:
            raise Unavailable(answer["unavailable"])
        return answer["value"]


def serve(start, *arguments):
    """The peer's side. `start` returns its versions, what answers requests, and what gives a last answer."""
    # Libraries print on standard output; only answers may go there.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def write(answer):
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    try:
        versions, respond, finish = start(*arguments)
        write({"value": versions})
        for line in sys.stdin:
            write({"value": respond(line.strip())})
        if finish is not None:
            write({"value": finish()})
    except Unavailable as error:
        write({"unavailable": str(error)})
    except Exception as error:
        traceback.print_exc()
        write({"unavailable": f"{type(error).__name__}: {error}"})


def start_peers(peers, arguments):
    """Starts peers, (name, peer, environment) each; returns the servers, and why others were left out."""
    servers, unavailable = [], {}
    for name, peer, environment in peers:
        print(f"starting {name}", file=sys.stderr)
        try:
            servers.append(Peer(name, peer, arguments, environment))
        except Unavailable as error:
            unavailable[name] = str(error)
            print(f"skipped {name}: {error}", file=sys.stderr)
    return servers, unavailable


def take_turns(servers, requests, rounds, unavailable):
    """Answers of each server by name and request: one round of warm-up, then measured ones, all in turns."""
    answers = {server.name: {request: [] for request in requests} for server in servers}
    for turn in range(rounds + 1):
        for server in list(servers):
            try:
                for request in requests:
                    time.sleep(PAUSE_S)
                    answer = server.ask(request)
                    if turn > 0:
                        answers[server.name][request].append(answer)
            except Unavailable as error:
                unavailable[server.name] = str(error)
                print(f"skipped {server.name}: {error}", file=sys.stderr)
                servers.remove(server)
                server.kill()
        print(f"round {turn}/{rounds}" if turn else "warmed up", file=sys.stderr)
    return {server.name: answers[server.name] for server in servers}


def table(head, rows):
    """Prints a Markdown table."""
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def processor():
    """What the machine's processor calls itself."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return "unknown processor"


def print_skipped(unavailable):
    """Prints which peers are missing in a table, and why."""
    for name, reason in unavailable.items():
        print(f"\nSkipped {name}: {reason}")
