#!/usr/bin/env python3
"""Compares calls through hopguard with the same calls made directly, to services that accept connections slowly.

Each case is a kind of service, a listen backlog and a number of callers that keep their connections. The failures through hopguard must not be
more than those of the direct calls + 0.1 %, and the circuit breaker must stay closed (while the service listens). `docs/benchmarks.md`
describes the result. Python's standard library and the `openssl` command only. Exit code: 0 as it must be, 1 a case is worse, 2 invalid command line.
"""

import argparse
import asyncio
import multiprocessing
import os
import re
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.request

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# What a call may take, connecting included: `timeouts.request` of hopguard, and the same for a direct call.
CALL_SECONDS = 2.0
# More failures than the direct calls have, as a share of all calls.
TOLERANCE = 0.001
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: 5\r\n\r\nhello"
LAST_ANSWER = ANSWER.replace(b"content-type", b"connection: close\r\ncontent-type")
POLICY = """apiVersion: hopguard.dev/v1alpha1
kind: Policy
listeners:
  - {{ name: in, bind: "127.0.0.1:{port}", to: app }}
destinations:
  - name: app
    endpoints: ["127.0.0.1:{service}"]
{more}"""


class Service:
    """A service of one kind, in a process of its own."""

    def __init__(self, kind, backlog, folder):
        self.kind, self.backlog, self.folder = kind, backlog, folder

    def __enter__(self):
        socket_ = socket.socket()
        socket_.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        socket_.bind(("127.0.0.1", 0))
        self.port = socket_.getsockname()[1]
        if self.kind in ("http10", "http11"):
            socket_.close()
            command = [sys.executable, "-m", "http.server", str(self.port), "--bind", "127.0.0.1", "--directory", self.folder]
            command += ["--protocol", "HTTP/1.1"] if self.kind == "http11" else []
            self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            listening("127.0.0.1", self.port)
        else:
            # Python's `listen` may not be called twice for a smaller backlog: the process inherits a socket that does not listen yet.
            self.process = multiprocessing.get_context("fork").Process(
                target=lambda: asyncio.run(serve(socket_, self.kind, self.backlog, self.folder)), daemon=True
            )
            self.process.start()
            socket_.close()
            listening("127.0.0.1", self.port)
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait() if hasattr(self.process, "wait") else self.process.join()


async def serve(listener, kind, backlog, folder):
    """Accepts connections as `kind` says, and answers every request on them."""
    context = None
    if kind == "tls":
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(os.path.join(folder, "cert.pem"), os.path.join(folder, "key.pem"))
    connections = set()
    listener.setblocking(False)
    listener.listen(backlog)
    pauses = asyncio.create_task(pause(connections)) if kind in ("held", "restart") else None
    address = listener.getsockname()
    while True:
        if pauses and PAUSED["now"]:
            if kind == "restart" and listener.fileno() >= 0:
                listener.close()
            await asyncio.sleep(0.01)
            continue
        if listener.fileno() < 0:
            listener = socket.socket()
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.setblocking(False)
            listener.listen(backlog)
        try:
            stream, _ = listener.accept()
        except BlockingIOError:
            await asyncio.sleep(0.001)
            continue
        stream.setblocking(False)
        task = asyncio.create_task(converse(stream, context))
        connections.add(task)
        task.add_done_callback(connections.discard)
        if kind == "every-300ms":
            await asyncio.sleep(0.3)


PAUSED = {"now": False}
# The tasks of connections with a request in progress.
BUSY = set()


async def pause(connections):
    """A graceful restart after two seconds: idle connections are closed, busy ones after their answer, and nothing is accepted for half a second."""
    await asyncio.sleep(2)
    PAUSED["now"] = True
    for task in connections - BUSY:
        task.cancel()
    await asyncio.sleep(0.5)
    PAUSED["now"] = False


async def converse(stream, context):
    writer = None
    try:
        if context:
            await asyncio.sleep(0.4)
        reader, writer = await asyncio.open_connection(sock=stream) if not context else await secured(stream, context)
        while await reader.readuntil(b"\r\n\r\n"):
            BUSY.add(asyncio.current_task())
            await asyncio.sleep(0.005)
            writer.write(LAST_ANSWER if PAUSED["now"] else ANSWER)
            BUSY.discard(asyncio.current_task())
            if PAUSED["now"]:
                await writer.drain()
                return
    except (OSError, EOFError, asyncio.IncompleteReadError, asyncio.CancelledError):
        pass
    finally:
        BUSY.discard(asyncio.current_task())
        writer.close() if writer else stream.close()


async def secured(stream, context):
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(reader)
    transport, _ = await loop.connect_accepted_socket(lambda: protocol, stream, ssl=context)
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


class Caller:
    """One caller that keeps its connection while calls succeed."""

    def __init__(self, port, context):
        self.port, self.context, self.stream = port, context, None

    async def call(self):
        if self.stream is None:
            server_hostname = "localhost" if self.context else None
            self.stream = await asyncio.open_connection("127.0.0.1", self.port, ssl=self.context, server_hostname=server_hostname)
        reader, writer = self.stream
        writer.write(b"GET / HTTP/1.1\r\nhost: app\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)[1])
        await reader.readexactly(length)
        if re.search(rb"(?i)\r\nconnection: *close", head) or head.startswith(b"HTTP/1.0"):
            self.close()
        return head.split(None, 2)[1].decode()

    def close(self):
        if self.stream:
            self.stream[1].close()
        self.stream = None


async def call_again(port, context, limit, until, results):
    caller = Caller(port, context)
    while time.monotonic() < until:
        try:
            result = await asyncio.wait_for(caller.call(), limit)
        except (OSError, EOFError, asyncio.IncompleteReadError, asyncio.TimeoutError) as error:
            result = type(error).__name__
            caller.close()
        results[result] = results.get(result, 0) + 1
        await asyncio.sleep(0.02 if result == "200" else 0.1)
    caller.close()


def load(port, context, limit, callers, seconds):
    async def run():
        results, until = {}, time.monotonic() + seconds
        await asyncio.gather(*(call_again(port, context, limit, until, results) for _ in range(callers)))
        return results

    return asyncio.run(run())


def listening(host, port):
    for _ in range(500):
        try:
            with open("/proc/net/tcp") as table:
                if f":{port:04X} 00000000:0000 0A" in table.read():
                    return
        except OSError:
            pass
        time.sleep(0.01)
    raise RuntimeError(f"nothing listens on {host}:{port}")


class Hopguard:
    def __init__(self, binary, service, folder, workers):
        self.binary, self.service, self.folder, self.workers = binary, service, folder, workers

    def __enter__(self):
        ports = [socket.socket() for _ in range(2)]
        for one in ports:
            one.bind(("127.0.0.1", 0))
        self.port, self.admin = (one.getsockname()[1] for one in ports)
        for one in ports:
            one.close()
        more = "    tls: { ca: cert.pem, serverName: localhost }\n    protocol: http1\n" if self.service.kind == "tls" else ""
        path = os.path.join(self.folder, "policy.yaml")
        with open(path, "w") as file:
            file.write(POLICY.format(port=self.port, service=self.service.port, more=more))
        command = [self.binary, "run", "--policy", path, "--admin", f"127.0.0.1:{self.admin}", "--workers", str(self.workers)]
        self.log = open(os.path.join(self.folder, "hopguard.log"), "w")
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=self.log)
        listening("127.0.0.1", self.port)
        return self

    def breaker_openings(self):
        page = urllib.request.urlopen(f"http://127.0.0.1:{self.admin}/metrics").read().decode()
        found = re.findall(r'hopguard_circuit_breaker_changes_total\{[^}]*state="open"[^}]*\} (\d+)', page)
        return sum(map(int, found))

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()
        self.log.close()


def failures(results):
    return sum(count for result, count in results.items() if result != "200")


def measured(options, kind, backlog, callers, folder):
    context = ssl.create_default_context(cafile=os.path.join(folder, "cert.pem")) if kind == "tls" else None
    with Service(kind, backlog, folder) as service:
        direct = load(service.port, context, CALL_SECONDS, callers, options.seconds)
    with Service(kind, backlog, folder) as service, Hopguard(options.binary, service, folder, options.workers) as hopguard:
        through = load(hopguard.port, None, 10, callers, options.seconds)
        openings = hopguard.breaker_openings()
    shares = [failures(results) / max(1, sum(results.values())) for results in (direct, through)]
    is_good = shares[1] <= shares[0] + TOLERANCE and (openings == 0 or kind == "restart")
    row = [kind, backlog, callers, sum(direct.values()), f"{shares[0]:.2%}", sum(through.values()), f"{shares[1]:.2%}", openings]
    others = {result: count for result, count in through.items() if result != "200"}
    print("|", " | ".join(map(str, row)), "|", "" if is_good else "worse", others or "", flush=True)
    return is_good


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", type=os.path.abspath, default=os.path.join(ROOT, "target/release/hopguard"))
    parser.add_argument("--kinds", default="prompt,every-300ms,tls,held,restart,http10,http11")
    parser.add_argument("--backlogs", default="1,5,50")
    parser.add_argument("--callers", default="16,64,256")
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    numbers = lambda text: [int(part) for part in text.split(",")]
    print("| service | backlog | callers | direct calls | failed | calls through hopguard | failed | breaker openings |\n|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        make_certificate(folder)
        with open(os.path.join(folder, "index.html"), "w") as file:
            file.write("hello")
        results = [
            measured(options, kind, backlog, callers, folder)
            for kind in options.kinds.split(",")
            # `http.server` has a backlog of 5.
            for backlog in (numbers(options.backlogs) if not kind.startswith("http1") else [5])
            for callers in numbers(options.callers)
        ]
    return 0 if all(results) else 1


def make_certificate(folder):
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost -keyout key.pem -out cert.pem"
    command = command.split() + ["-addext", "subjectAltName=DNS:localhost", "-addext", "basicConstraints=critical,CA:FALSE"]
    subprocess.run(command, cwd=folder, check=True, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(main())
