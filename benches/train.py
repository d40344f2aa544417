#!/usr/bin/env python3
"""The training load of `scripts/release`: sends calls of every kind through an instrumented hopguard (profile-guided optimisation).

Each of KINDS runs for the same time. Code that no call here executes is laid out as rarely used code and becomes slower.
Python's standard library only. Exit code: 0 done, 1 an unexpected response, 2 invalid command line, or a tool is missing.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass

from lab import loads
from lab.processes import LOAD_CORES, PROXY_CORES, Daemon, free_ports
from lab.subjects import ANSWER, BODY_BYTES, nginx_frame, written

TOOLS = {"nginx": "apt-get install nginx", "h2load": "apt-get install nghttp2-client", "openssl": "apt-get install openssl"}
ORDER = "/orders/42"
HTTP1, HTTP2 = ("--h1", "-c64"), ("-c8", "-m16")
# The ports of the upstream. Each has a listener and a destination of hopguard; the values are the further fields of both in the policy.
PORTS = {
    "h1": ("", "protocol: http1"),
    "h2": ("", "protocol: http2"),
    "tls": (", tls: { certificate: tls.crt, key: tls.key }", "tls: { ca: tls.crt, serverName: localhost }"),
    "bad": ("", "protocol: http1\n    circuitBreaker: { consecutiveFailures: 100 }"),
}
TRACED = ("-H", "traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "-H", "x-envoy-expected-rq-timeout-ms: 9000")


@dataclass
class Kind:
    """Calls of one kind: the listener, the path, the flags of h2load, the file of the request body, and whether some calls must fail."""

    title: str
    listener: str
    path: str
    flags: tuple
    sends: str = ""
    fails: bool = False


KINDS = [
    Kind("HTTP/1.1", "h1", ORDER, HTTP1),
    Kind("HTTP/2", "h2", ORDER, HTTP2),
    Kind("HTTP/1.1 with deadline and trace", "h1", ORDER, HTTP1 + TRACED),
    Kind("HTTP/2 with deadline and trace", "h2", ORDER, HTTP2 + TRACED),
    Kind("HTTP/1.1 to HTTP/2", "h2", ORDER, HTTP1),
    Kind("HTTP/2 to HTTP/1.1", "h1", ORDER, HTTP2),
    Kind("HTTP/1.1, 1 KiB sent", "h1", ORDER, HTTP1, sends="kib"),
    Kind("HTTP/2, 1 KiB sent", "h2", ORDER, HTTP2, sends="kib"),
    Kind("HTTP/1.1, 1 MiB sent", "h1", ORDER, ("--h1", "-c16"), sends="mib"),
    Kind("HTTP/1.1, responses of 1 MiB", "h1", "/mib", ("--h1", "-c16")),
    Kind("HTTP/2, responses of 1 MiB", "h2", "/mib", ("-c4", "-m4")),
    Kind("HTTP/1.1, TLS on both sides", "tls", ORDER, HTTP1),
    Kind("HTTP/2, TLS on both sides", "tls", ORDER, HTTP2),
    Kind("HTTP/1.1, some retried", "bad", ORDER, HTTP1, fails=True),
    Kind("HTTP/2, some retried", "bad", ORDER, HTTP2, fails=True),
    Kind("HTTP/1.1, most refused", "bad", "/limited", HTTP1, fails=True),
    Kind("HTTP/2, most refused", "bad", "/limited", HTTP2, fails=True),
]
# Kinds that run a second time, with an access log line for each call.
LOGGED = KINDS[:2]


def main():
    options = command_line()
    missing = {tool: install for tool, install in TOOLS.items() if not shutil.which(tool)}
    if missing:
        print(*(f"{tool} is missing: {install}" for tool, install in missing.items()), sep="\n", file=sys.stderr)
        return 2
    if options.binary is None:
        return 0
    # A signal leaves the `with` blocks normally, and they end the started processes.
    for sign in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(sign, lambda number, _: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="hopguard-train-") as folder:
        prepare(folder)
        ports = dict(zip(PORTS, free_ports(len(PORTS))))
        with start_upstream(folder, ports):
            train(options, folder, ports, "errors", KINDS)
            train(options, folder, ports, "all", LOGGED)
    return 0


def command_line():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", type=os.path.abspath, help="the instrumented hopguard; without it, only the tools are checked")
    parser.add_argument("--seconds", type=int, default=1, help="duration of each kind of call (1)")
    return parser.parse_args()


def prepare(folder):
    """Writes the files of a run: two request bodies, and a self-signed certificate."""
    os.chmod(folder, 0o755)  # nginx's worker is another user when the master is root
    for name, length in (("kib", 2**10), ("mib", BODY_BYTES)):
        with open(os.path.join(folder, name), "wb") as file:
            file.write(os.urandom(length))
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-addext", "basicConstraints=critical,CA:FALSE"]
    command += ["-keyout", os.path.join(folder, "tls.key"), "-out", os.path.join(folder, "tls.crt")]
    subprocess.run(command, check=True, capture_output=True)


def start_upstream(folder, ports):
    """nginx with responses from memory over HTTP/1.1, HTTP/2 and TLS; on the port `bad`, 30 % of the responses are 503."""
    locations = f"""
    location / {{ default_type application/json; return 200 '{ANSWER.decode()}'; }}
    location = /mib {{ default_type application/octet-stream; root {folder}; }}"""
    servers = f"""
  client_max_body_size 2m;
  split_clients $request_id $state {{ 30% 503; * 200; }}
  server {{ listen 127.0.0.1:{ports["h1"]}; {locations} }}
  server {{ listen 127.0.0.1:{ports["h2"]} http2; {locations} }}
  server {{ listen 127.0.0.1:{ports["tls"]} ssl http2; ssl_certificate {folder}/tls.crt; ssl_certificate_key {folder}/tls.key; {locations} }}
  server {{ listen 127.0.0.1:{ports["bad"]}; if ($state = 503) {{ return 503; }} {locations} }}"""
    config = written(folder, "upstream.conf", nginx_frame(folder, "upstream", servers))
    return started(Daemon(["nginx", "-c", config], LOAD_CORES, os.path.join(folder, "upstream.log")), ports)


def started(daemon, ports):
    try:
        for port in ports.values():
            daemon.wait_for(port)
    except BaseException:
        daemon.stop()
        raise
    return daemon


def train(options, folder, upstream, log, kinds):
    """Starts one hopguard with the access log mode `log` and sends these kinds of calls through it."""
    ports = dict(zip(PORTS, free_ports(len(PORTS))))
    path = written(folder, "policy.yaml", policy(folder, ports, upstream, log))
    command = [options.binary, "run", "--policy", path, "--admin", "127.0.0.1:0", "--workers", "1", "--drain-delay", "0s"]
    with started(Daemon(command, PROXY_CORES, os.path.join(folder, "hopguard.log")), ports):
        for kind in kinds:
            print(f"{kind.title} (access log: {log})", file=sys.stderr, flush=True)
            call(kind, folder, ports[kind.listener], options.seconds)


def policy(folder, ports, upstream, log):
    listeners = "".join(f'\n  - {{ name: {name}, bind: "127.0.0.1:{port}", to: {name}{PORTS[name][0]} }}' for name, port in ports.items())
    destinations = "".join(
        f"""
  - name: {name}
    endpoints: ["127.0.0.1:{port}"]
    {PORTS[name][1]}
    routes:
      - {{ name: order, match: {{ path: "/orders/{{id}}" }} }}
      - {{ name: limited, match: {{ path: /limited }}, rateLimit: {{ requests: 10 }} }}"""
        for name, port in upstream.items()
    )
    return f"""apiVersion: hopguard.dev/v1alpha1
kind: Policy
service: train
accessLog: {{ mode: {log} }}
defaults: {{ timeouts: {{ connect: 5s, request: 30s }} }}
listeners:{listeners}
destinations:{destinations}
"""


def call(kind, folder, port, seconds):
    scheme = "https" if kind.listener == "tls" else "http"
    sends = ("-d", os.path.join(folder, kind.sends)) if kind.sends else ()
    text = loads.output_of(["h2load", "-t1", f"-D{seconds}", *kind.flags, *sends, f"{scheme}://127.0.0.1:{port}{kind.path}"])
    good = int(re.search(r"(\d+) 2xx", text)[1])
    bad = sum(map(int, re.search(r"(\d+) 3xx, (\d+) 4xx, (\d+) 5xx", text).groups()))
    if not good or bool(bad) != kind.fails:
        raise RuntimeError(f"{kind.title}: {good} successful responses and {bad} others:\n{text[-1000:]}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
