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
    """What one run of a generator saw: answers, the time it took, latencies in microseconds (zero where it does not measure them), and
    answers that were no 2xx or never came."""

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


def h2load(port, path, connections, streams, seconds, *more):
    """HTTP/2 with prior knowledge. Without latencies: writing them down would take the generator more time than the answers do."""
    url = f"http://127.0.0.1:{port}{path}"
    text = output_of(["h2load", "-t1", f"-c{connections}", f"-m{streams}", f"-D{seconds}", *more, url])
    done = int(re.search(r"(\d+) done", text)[1])
    if not done:
        raise RuntimeError(f"h2load got no answer:\n{text[-1000:]}")
    lost = re.search(r"(\d+) failed, (\d+) errored, (\d+) timeout", text).groups()
    wrong = re.search(r"(\d+) 3xx, (\d+) 4xx, (\d+) 5xx", text).groups()
    return Load(done, float(seconds), 0, 0, sum(map(int, lost + wrong)))


def h2load_exactly(requests, port, path, *flags):
    """So many requests, with h2load's `flags`; raises unless the status of every answer is a 2xx."""
    text = output_of(["h2load", "-t1", f"-n{requests}", *flags, f"http://127.0.0.1:{port}{path}"])
    good = int(re.search(r"(\d+) 2xx", text)[1])
    if good != requests:
        raise RuntimeError(f"{good} of {requests} requests of h2load had a good answer:\n{text[-1000:]}")


def h2load_latencies(port, path, connections, streams, folder):
    """A second of the same load, each request written down: the summary has no percentiles. In microseconds: p50, p99."""
    log = os.path.join(folder, "h2load.log")
    failed = h2load(port, path, connections, streams, 1, f"--log-file={log}").failed
    if failed:
        raise RuntimeError(f"{failed} requests of h2load had no answer, or a wrong one")
    with open(log, encoding="ascii") as lines:
        micros = sorted(int(line.split()[2]) for line in lines)
    os.remove(log)
    return micros[len(micros) // 2], micros[len(micros) * 99 // 100]


def fetch(port, path):
    """One request with a client of its own: the status and the body."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        return answer.status, answer.read()
