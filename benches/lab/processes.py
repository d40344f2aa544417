"""Child processes: started on given cores in their own session, measured through /proc, and ended with all their children."""

import os
import random
import signal
import socket
import subprocess
import time

# Some systems install servers outside the PATH of unprivileged users.
os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])

TICK = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")
CORES = sorted(os.sched_getaffinity(0))
PROXY_CORES = CORES[:1]
# Load generator and upstream share the cores that the proxy does not use; on a machine with one core all share it.
LOAD_CORES = CORES[1:] or CORES


def pinned(command, cores):
    return ["taskset", "--cpu-list", ",".join(map(str, cores)), *map(str, command)]


def free_ports(count):
    """Unused loopback ports. They are below the ephemeral range of the system, so that no outgoing connection and no bind to port 0
    takes one before its server listens there."""
    ports = []
    for port in random.sample(range(10_000, 20_000), 1000):
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        ports.append(port)
        if len(ports) == count:
            return ports
    raise RuntimeError("no port between 10000 and 20000 is free")


class Daemon:
    """A measured server, or one that it needs. Use it in a `with` statement: leaving the block ends the whole session."""

    def __init__(self, command, cores, log):
        self.log = log
        with open(log, "wb") as output:
            self.process = subprocess.Popen(
                pinned(command, cores), stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        for sign in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, sign)
                self.process.wait(timeout=3)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                pass
        self.process.poll()

    def wait_for(self, port):
        """Returns when the port accepts connections; raises with the end of the log if the process ends or after ten seconds."""
        end = time.monotonic() + 10
        while time.monotonic() < end and self.process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                return
            except OSError:
                time.sleep(0.02)
        with open(self.log, encoding="utf-8", errors="replace") as log:
            raise RuntimeError(f"no process listens on port {port}; its log ends with:\n{log.read()[-2000:]}")

    def cpu_seconds(self):
        """User and system time of every process of the session, to the clock tick (10 ms on most machines)."""
        return sum(int(fields[11]) + int(fields[12]) for fields in self._stats()) / TICK

    def resident_mib(self):
        """Resident pages of every process of the session; shared pages are counted once per process."""
        return sum(int(fields[21]) for fields in self._stats()) * PAGE / 2**20

    def _stats(self):
        """The fields of /proc/PID/stat from the third on. The second is a name in brackets, which may contain any character."""
        for entry in os.scandir("/proc"):
            if not entry.name.isdigit():
                continue
            try:
                with open(f"/proc/{entry.name}/stat", encoding="utf-8", errors="replace") as stat:
                    fields = stat.read().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == self.process.pid:
                yield fields
