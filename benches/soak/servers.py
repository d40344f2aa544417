"""The upstreams of the soak: how each is started, and the graceful restarts of its documentation."""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import zipfile
from dataclasses import dataclass, field

from soak.http1 import Caller
from soak.outcome import CallError

APPS = "tests/servers"
HOME = "target/peers/servers"
VENV = "target/peers/venv/bin"
GO = "target/peers/bin/peer-go"
# Kubernetes sends SIGKILL after this time, too.
GRACE_SECONDS = 30
START_SECONDS = 60
PROBE_SECONDS = 0.05
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


@dataclass
class Kind:
    """One server software. `reload`: a signal after which the same process serves on with new workers. `stop`: the signals of a graceful
    stop, after which a new process takes the port. `overlap`: the new process can listen beside the old one."""

    name: str
    command: list
    stop: tuple = ("TERM",)
    reload: str | None = None
    overlap: bool = False
    grpc: bool = False
    http2: bool = False
    every: float = 8
    env: dict = field(default_factory=dict)
    version: object = None

    def ways(self):
        reloads = [self.reload] if self.reload else []
        return reloads + list(self.stop)


def python_version(package):
    return lambda: output([f"{VENV}/pip", "list", "--format=json"], lambda text: next(
        entry["version"] for entry in json.loads(text) if entry["name"].lower() == package))


def output(command, part):
    done = subprocess.run(command, capture_output=True, text=True)
    return part(done.stdout + done.stderr)


def jar_version(name, files):
    """The version in the file name of a jar, among names of files."""
    found = (re.fullmatch(rf"(?:.*/)?{name}-(\d[\w.]*)\.jar", file) for file in files)
    return next(match[1] for match in found if match)


def boot_version(jar):
    with zipfile.ZipFile(jar) as archive:
        files = archive.namelist()
    return f"{jar_version('spring-boot', files)}, Tomcat {jar_version('tomcat-embed-core', files)}"


def kinds(folder):
    gunicorn = [f"{VENV}/gunicorn", "--chdir", APPS, "-b", "127.0.0.1:PORT", "-k", "gthread", "--threads", "32", "wsgi_app:app"]
    # One compiler tier shortens the start.
    java = ["java", "-XX:TieredStopAtLevel=1", "-Xmx256m"]
    boot = f"{HOME}/boot/target/boot-1.jar"
    boot35 = f"{HOME}/boot-3.5/target/boot-1.jar"
    jetty = f"{HOME}/jetty/target"
    go_grpc = lambda: output(["go", "version", "-m", GO], lambda text: next(
        line.split()[2] for line in text.splitlines() if "google.golang.org/grpc" in line))
    return [
        Kind("nginx", ["nginx", "-c", f"{folder}/nginx.conf"], ("QUIT",), "HUP",
             version=lambda: output(["nginx", "-v"], lambda text: text.split("/")[-1].split()[0])),
        Kind("gunicorn", gunicorn, reload="HUP", version=python_version("gunicorn")),
        Kind("uvicorn", [f"{VENV}/uvicorn", "--app-dir", APPS, "--port", "PORT", "--log-level", "warning", "asgi_app:app"],
             version=python_version("uvicorn")),
        Kind("hypercorn", [f"{VENV}/hypercorn", "-b", "127.0.0.1:PORT", f"{APPS}/asgi_app:app"], http2=True,
             version=python_version("hypercorn")),
        Kind("node", ["node", f"{APPS}/node_app.js"], version=lambda: output(["node", "--version"], str.strip)),
        Kind("go", [GO], http2=True, version=lambda: output(["go", "version", GO], lambda text: text.split()[-1])),
        Kind("boot", [*java, "-jar", boot, "--server.port=PORT", "--server.address=127.0.0.1"], every=14,
             version=lambda: boot_version(boot)),
        Kind("boot-3.5", [*java, "-jar", boot35, "--server.port=PORT", "--server.address=127.0.0.1"], every=14,
             version=lambda: boot_version(boot35)),
        Kind("jetty", [*java, "-cp", f"{jetty}/jetty-1.jar:{jetty}/lib/*", "peer.Jetty"], http2=True, every=12,
             version=lambda: jar_version("jetty-server", os.listdir(f"{jetty}/lib"))),
        Kind("grpcio", [f"{VENV}/python3", f"{APPS}/grpc_app.py"], grpc=True, overlap=True, version=python_version("grpcio")),
        Kind("grpc-go", [GO, "grpc"], grpc=True, version=go_grpc),
    ]


# One of the two generations of Spring Boot belongs to a run without --only.
DEFAULT = ["nginx", "gunicorn", "uvicorn", "hypercorn", "node", "go", "boot", "jetty", "grpcio", "grpc-go"]


class Server:
    """One upstream at one port, over all its restarts."""

    def __init__(self, kind, port, folder):
        self.kind, self.port, self.folder = kind, port, folder
        self.record = os.path.join(folder, "executed")
        self.process = None
        self.old = []
        self.restarts = []
        # (moment, reached): each attempt to reach the server over a fresh connection.
        self.probes = []

    async def start(self):
        self.prepare()
        command = [part.replace("PORT", str(self.port)) for part in self.kind.command]
        environment = os.environ | {"PORT": str(self.port), "RECORD": self.record} | self.kind.env
        with open(os.path.join(self.folder, "server.log"), "ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True)

    def prepare(self):
        if self.kind.name != "nginx":
            return
        with open(f"{APPS}/nginx.conf", encoding="utf-8") as file:
            text = file.read().replace("FOLDER", self.folder).replace("RECORD", self.record).replace("PORT", str(self.port))
        with open(f"{self.folder}/nginx.conf", "w", encoding="utf-8") as file:
            file.write(text)
        with open(f"{self.folder}/events", "w", encoding="utf-8") as file:
            file.write("".join(f"id: {number}\ndata: event {number}\n\n" for number in range(20)))

    async def ready(self):
        """Returns when the server answers."""
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if await self.probe():
                return
            if self.process.returncode is not None:
                break
            await asyncio.sleep(0.05)
        raise RuntimeError(f"{self.kind.name} does not answer; see {self.folder}/server.log")

    async def probe(self):
        """Whether a fresh connection gets an answer."""
        begun = time.monotonic()
        try:
            async with asyncio.timeout(1):
                await (self.settings() if self.kind.grpc else Caller(self.port, keep=False).call("GET", "/get"))
            reached = True
        except (CallError, OSError, TimeoutError, asyncio.IncompleteReadError):
            reached = False
        self.probes.append((begun, time.monotonic(), reached))
        return reached

    async def settings(self):
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(PREFACE)
            await reader.readexactly(9)
        finally:
            writer.close()

    async def restart(self, way):
        self.restarts.append((time.monotonic(), way))
        if way == self.kind.reload:
            self.process.send_signal(getattr(signal, "SIG" + way))
            return
        old = self.process
        if self.kind.overlap:
            await self.start()
            await asyncio.sleep(1)
        old.send_signal(getattr(signal, "SIG" + way))
        self.old.append((old, time.monotonic()))
        if not self.kind.overlap:
            while not self.port_is_free():
                await asyncio.sleep(0.01)
            await self.start()

    def port_is_free(self):
        """Whether no process listens; connections of the old process may go on."""
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", self.port))
            except OSError:
                return False
        return True

    async def watch(self):
        """Probes all the time, and starts a process anew that has ended by itself."""
        while True:
            await self.probe()
            if self.process.returncode is not None and self.process not in (old for old, _ in self.old):
                await self.start()
            await asyncio.sleep(PROBE_SECONDS)

    def end_old(self, every=False):
        """SIGKILL for processes whose grace time has passed."""
        for process, since in self.old:
            if process.returncode is None and (every or time.monotonic() > since + GRACE_SECONDS):
                kill_session(process)

    async def stop(self):
        self.end_old(every=True)
        if self.process:
            kill_session(self.process)
            await self.process.wait()

    def executed(self):
        try:
            with open(self.record, encoding="utf-8") as file:
                return file.read().split()
        except FileNotFoundError:
            return []


def kill_session(process):
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def missing(chosen):
    """The programs of the chosen servers that are not there."""
    files = [part for kind in chosen for part in kind.command if part.endswith(".jar") or part.startswith((VENV, HOME, GO))]
    programs = {kind.command[0] for kind in chosen}
    return [file for file in {*files, *programs} if not os.path.exists(file.split(":")[0]) and not shutil.which(file)]
