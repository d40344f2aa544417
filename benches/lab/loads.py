"""The load generators: wrk for HTTP/1.1, h2load for HTTP/2. Both say how many answers there were and how many were not as wanted."""

import json
import os
import re
import shutil
import subprocess
import urllib.request
from dataclasses import dataclass

from lab.processes import LOAD_CORES, pinned

TOOLS = {"wrk": "apt-get install wrk", "h2load": "apt-get install nghttp2-client"}
SCRIPT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "report.lua")


@dataclass
class Load:
    """What one run of a generator saw: answers, the time it took, latencies in microseconds, and answers that were no 2xx or never came."""

    requests: int
    seconds: float
    p50: float
    p99: float
    failed: int


def missing_tools():
    return {tool: install for tool, install in TOOLS.items() if not shutil.which(tool)}


def output_of(command):
    done = subprocess.run(pinned(command, LOAD_CORES), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}: {(done.stderr or done.stdout)[-1000:]}")
    return done.stdout


def wrk(port, path, connections, seconds, paths=()):
    """HTTP/1.1 over kept-alive connections; `paths`, where given, are asked for in turn instead of `path`."""
    url = f"http://127.0.0.1:{port}{path}"
    text = output_of(["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s", "-s", SCRIPT, url, "--", *paths])
    found = json.loads(text.partition("RESULT ")[2].splitlines()[0])
    return Load(found["requests"], found["microseconds"] / 1e6, found["p50"], found["p99"], found["failed"])


def h2load(port, path, connections, streams, seconds, folder):
    """HTTP/2 with prior knowledge. Latencies come from its log of single requests: its summary has no percentiles."""
    log = os.path.join(folder, "h2load.log")
    url = f"http://127.0.0.1:{port}{path}"
    text = output_of(["h2load", "-t1", f"-c{connections}", f"-m{streams}", f"-D{seconds}", f"--log-file={log}", url])
    statuses, micros = [], []
    with open(log, encoding="ascii") as lines:
        for line in lines:
            _, status, taken = line.split()
            statuses.append(status)
            micros.append(int(taken))
    os.remove(log)
    micros.sort()
    lost = sum(map(int, re.search(r"(\d+) failed, (\d+) errored, (\d+) timeout", text).groups()))
    failed = lost + sum(status != "200" for status in statuses)
    if not micros:
        raise RuntimeError(f"h2load got no answer:\n{text[-1000:]}")
    return Load(len(micros), float(seconds), micros[len(micros) // 2], micros[len(micros) * 99 // 100], failed)


def fetch(port, path):
    """One request with a client of its own: the status and the body."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        return answer.status, answer.read()
