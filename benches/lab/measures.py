"""The measures. Subjects take turns in every round, so that a load peak of the machine affects all of them; medians are compared."""

import os
import re
import resource
import socket
import time
from statistics import median

from lab import loads
from lab.processes import PROXY_CORES
from lab.subjects import ANSWER, BODY_BYTES, hopguard_policy

ORDER = "/orders/42"
IDLE_CONNECTIONS = 1000
ROUTES = (10, 10_000)
RELOADS = 3


class Lab:
    """One run: the started upstream, the folder for files, number and duration of the rounds, and the faults found."""

    def __init__(self, folder, upstream, rounds, seconds, say):
        self.folder, self.upstream, self.rounds, self.seconds, self.say = folder, upstream, rounds, seconds, say
        self.faults = []

    def alternate(self, title, running, load, latencies=None):
        """Loads the subjects in turn, first with one second of warm-up each, then round by round. `load(subject, seconds)` makes one run. If
        it does not measure latencies, `latencies(subject)` does so afterwards."""
        samples = {subject.name: [] for subject in running}
        for subject in running:
            load(subject, 1)
        for number in range(self.rounds):
            self.say(f"{title}: round {number + 1} of {self.rounds}")
            turn = number % len(running)
            for subject in running[turn:] + running[:turn]:
                samples[subject.name].append(self.sample(title, subject, load, latencies))
        return {name: summary(rows) | {"resident_mib": resident(name, running)} for name, rows in samples.items()}

    def sample(self, title, subject, load, latencies):
        before = subject.daemon.cpu_seconds()
        result = load(subject, self.seconds)
        cpu = subject.daemon.cpu_seconds() - before
        p50, p99 = latencies(subject) if latencies else (result.p50, result.p99)
        if result.failed:
            self.faults.append(f"{title}: {result.failed} of {result.requests} responses of {subject.name} were not 200")
        return {
            "cpu_us": cpu / max(result.requests, 1) * 1e6,
            "per_second": result.requests / result.seconds,
            "p50_us": p50,
            "p99_us": p99,
            "busy": cpu / result.seconds,
        }

    def start_all(self, subjects):
        """Starts every subject and sends one request to each, before any measurement."""
        running = []
        try:
            for subject in subjects:
                running.append(subject.start(self.folder, self.upstream))
                self.expect(running[-1], ORDER, len(ANSWER))
        except BaseException:
            stop_all(running)
            raise
        return running

    def expect(self, running, path, length):
        status, body = loads.fetch(running.h1, path)
        if status != 200 or len(body) != length:
            raise RuntimeError(f"{running.name} answered {path} with {status} and {len(body)} bytes instead of 200 and {length}")


def summary(rows):
    return {key: median(row[key] for row in rows) for key in rows[0]} | {"rounds": rows}


def resident(name, running):
    return next(subject.daemon.resident_mib() for subject in running if subject.name == name)


def stop_all(running):
    for subject in running:
        subject.daemon.stop()


def under_load(lab, subjects, title, load, latencies=None):
    running = lab.start_all(subjects)
    try:
        return lab.alternate(title, running, load, latencies)
    finally:
        stop_all(running)


def http1(lab, subjects):
    """64 persistent connections, a small JSON response."""

    def load(subject, seconds):
        return loads.wrk(subject.h1, ORDER, 64, seconds)

    return under_load(lab, subjects, "HTTP/1.1", load)


def http2(lab, subjects):
    """8 connections with 16 streams each, the same response."""

    def load(subject, seconds):
        return loads.h2load(subject.h2, ORDER, 8, 16, seconds)

    def latencies(subject):
        return loads.h2load_latencies(subject.h2, ORDER, 8, 16, lab.folder)

    return under_load(lab, subjects, "HTTP/2", load, latencies)


def bodies(lab, subjects):
    """16 persistent connections, responses of 1 MiB."""

    def load(subject, seconds):
        lab.expect(subject, "/mib", BODY_BYTES)
        return loads.wrk(subject.h1, "/mib", 16, seconds)

    return under_load(lab, subjects, "1 MiB bodies", load)


def memory(lab, subjects):
    """Resident memory: one second after the first response, with 1,000 idle connections after one request each, and after they closed."""
    found = {}
    for subject in subjects:
        lab.say(f"memory: {subject.name}")
        with subject.start(lab.folder, lab.upstream) as running:
            lab.expect(running, ORDER, len(ANSWER))
            time.sleep(1)
            idle = running.daemon.resident_mib()
            clients = [idle_connection(running.h1) for _ in range(IDLE_CONNECTIONS)]
            time.sleep(2)
            held = running.daemon.resident_mib()
            for client in clients:
                client.close()
            time.sleep(3)
            found[subject.name] = {"idle_mib": idle, "held_mib": held, "more_mib": held - idle, "closed_mib": running.daemon.resident_mib()}
    return found


def allow_many_files():
    """Raises the limit of open files: each idle connection is one here and one in the proxy, which inherits the limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def idle_connection(port):
    client = socket.create_connection(("127.0.0.1", port), timeout=10)
    client.sendall(f"GET {ORDER} HTTP/1.1\r\nHost: bench\r\n\r\n".encode())
    seen = b""
    while ANSWER not in seen:
        part = client.recv(65536)
        if not part:
            raise RuntimeError(f"an idle connection was closed after {seen[:100]!r}")
        seen += part
    return client


def routes(lab, hopguard):
    """hopguard with 10,000 routes compared with 10 routes. Both get requests for the same ten paths, spread evenly over the larger policy."""
    few, many = (route_paths(count) for count in ROUTES)
    asked = [path.replace("{id}", "42") for path in few]

    def load(subject, seconds):
        return loads.wrk(subject.h1, "/", 64, seconds, asked)

    with hopguard.start(lab.folder, lab.upstream, few, "few") as small, hopguard.start(lab.folder, lab.upstream, many, "many") as large:
        for running in (small, large):
            for path in asked:
                lab.expect(running, path, len(ANSWER))
        found = lab.alternate("routes", [small, large], load)
        lab.say("routes: reload")
        found["reload"] = reload_times(lab, large, many)
    return found


def route_paths(count):
    step = ROUTES[-1] // count
    return [f"/area-{index // 100}/kind-{index}/{{id}}" for index in range(0, ROUTES[-1], step)]


def reload_times(lab, running, paths):
    """Milliseconds from the rename of the new file to its policy on the admin port, and the duration of the reload by its metric."""
    seen, told = [], []
    for number in range(RELOADS):
        text = hopguard_policy(running.h1, running.h2, lab.upstream, paths, request=f"{3 + number}s")
        new, policy = os.path.join(lab.folder, "new.part"), os.path.join(lab.folder, "many.yaml")
        with open(new, "w", encoding="utf-8") as file:
            file.write(text)
        before, metric = policy_hash(running.admin), reload_metric(running.admin)
        start = time.monotonic()
        os.rename(new, policy)
        while policy_hash(running.admin) == before:
            if time.monotonic() > start + 10:
                raise RuntimeError("a renamed policy was not loaded within ten seconds")
            time.sleep(0.01)
        seen.append((time.monotonic() - start) * 1000)
        told.append(between(metric, reload_metric(running.admin)))
    return {"seen_ms": median(seen), "told_ms": median(told) if None not in told else None}


def policy_hash(admin):
    _, body = loads.fetch(admin, "/policy")
    found = re.search(rb'"hash"\s*:\s*"?([0-9A-Za-z]+)', body)
    return found.group(1) if found else body


def reload_metric(admin):
    """Sum and count of `hopguard_policy_load_duration_seconds`; a gauge has no count."""
    _, body = loads.fetch(admin, "/metrics")
    pattern = r"^hopguard_policy_load_duration_seconds(_sum|_count)?(?:\{[^}]*\})? (\S+)"
    found = re.findall(pattern, body.decode(), re.MULTILINE)
    return {kind: sum(float(value) for other, value in found if other == kind) for kind, _ in found}


def between(before, after):
    if after.get("_count", 0) > before.get("_count", 0):
        return (after["_sum"] - before.get("_sum", 0)) / (after["_count"] - before.get("_count", 0)) * 1000
    return after[""] * 1000 if "" in after else None


def machine():
    """The properties of the machine that affect the figures."""
    with open("/proc/cpuinfo", encoding="utf-8") as info:
        model = next((line.partition(":")[2].strip() for line in info if line.startswith("model name")), "unknown")
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "proxy_core": PROXY_CORES[0],
        "kernel": os.uname().release,
        "load_before": os.getloadavg()[0],
    }
