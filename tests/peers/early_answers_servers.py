"""Servers that respond 413 before they have read the request's body, at their defaults: raw sockets, gunicorn, Node, Go.

Prints one line of JSON with the port of each server that is installed; ends at the end of standard input. The first
argument is the path of the Go program (tests/peers/early_answers.go), if it is built.
"""

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading

FOLDER = os.path.dirname(os.path.abspath(__file__))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def raw():
    """Responds to the head, and closes with the rest of the body unread: the kernel sends a reset behind the response."""
    door = socket.socket()
    door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    door.bind(("127.0.0.1", 0))
    door.listen(64)

    def serve(wire):
        with wire:
            got = b""
            while b"\r\n\r\n" not in got:
                more = wire.recv(65536)
                if not more:
                    return
                got += more
            wire.sendall(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 7\r\nConnection: close\r\n\r\ntoo big")

    def run():
        while True:
            threading.Thread(target=serve, args=(door.accept()[0],), daemon=True).start()

    threading.Thread(target=run, daemon=True).start()
    return door.getsockname()[1]


def end_with_parent():
    """Has a child ended with this process, also when a test that is over kills it (prctl(2), PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def wait_for(port):
    for _ in range(1000):
        with socket.socket() as probe:
            probe.settimeout(10)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        threading.Event().wait(0.02)
    sys.exit(f"nothing listens on {port}")


def main():
    ports, children = {"raw": raw()}, []

    def start(name, *command):
        port = free_port()
        command = [part.replace("PORT", str(port)) for part in command]
        children.append(subprocess.Popen(command, cwd=FOLDER, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                         stderr=subprocess.DEVNULL, preexec_fn=end_with_parent))
        wait_for(port)
        ports[name] = port

    gunicorn = os.path.join(os.path.dirname(sys.executable), "gunicorn")
    if os.path.exists(gunicorn):
        start("gunicorn", gunicorn, "-b", "127.0.0.1:PORT", "early_answers_servers:app")
    if shutil.which("node"):
        start("node", "node", "early_answers.mjs", "server", "PORT")
    if len(sys.argv) > 1:
        start("go", sys.argv[1], "server", "PORT")
    print(json.dumps(ports), flush=True)
    sys.stdin.read()
    for child in children:
        child.terminate()
    for child in children:
        child.wait()


def app(environ, start_response):
    """The application of gunicorn; it leaves the body unread."""
    start_response("413 Content Too Large", [("Content-Type", "text/plain"), ("Content-Length", "7")])
    return [b"too big"]


if __name__ == "__main__":
    main()
