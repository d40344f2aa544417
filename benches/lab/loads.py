"""The load generators: wrk for HTTP/1.1, h2load for HTTP/2. Both report the number of responses and of failures."""

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
    """Result of one run: responses, duration in seconds, latencies in microseconds (0 if the generator does not measure them), and
    failures: responses other than 2xx, and missing ones."""

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
    """HTTP/1.1 over persistent connections; `paths`, if given, are requested in turn instead of `path`."""
    url = f"http://127.0.0.1:{port}{path}"
    text = output_of(["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s", "-s", SCRIPT, url, "--", *paths])
    found = json.loads(text.partition("RESULT ")[2].splitlines()[0])
    return Load(found["requests"], found["microseconds"] / 1e6, found["p50"], found["p99"], found["failed"])


def h2load(port, path, connections, streams, seconds, *more):
    """HTTP/2 with prior knowledge. Without latencies: logging them would cost the generator more than the responses do."""
    url = f"http://127.0.0.1:{port}{path}"
    text = output_of(["h2load", "-t1", f"-c{connections}", f"-m{streams}", f"-D{seconds}", *more, url])
    done = int(re.search(r"(\d+) done", text)[1])
    if not done:
        raise RuntimeError(f"h2load got no response:\n{text[-1000:]}")
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
    """One second of the same load with a log line per request, because the summary has no percentiles. Returns p50 and p99 in microseconds."""
    log = os.path.join(folder, "h2load.log")
    failed = h2load(port, path, connections, streams, 1, f"--log-file={log}").failed
    if failed:
        raise RuntimeError(f"{failed} requests of h2load had no response, or an unexpected one")
    with open(log, encoding="ascii") as lines:
        micros = sorted(int(line.split()[2]) for line in lines)
    os.remove(log)
    return micros[len(micros) // 2], micros[len(micros) * 99 // 100]


def fetch(port, path):
    """Sends one request on a new connection; returns status and body."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        return answer.status, answer.read()
