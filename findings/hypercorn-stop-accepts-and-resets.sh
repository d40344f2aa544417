#!/usr/bin/env bash
# hypercorn 0.18.0 at SIGTERM: while its worker completes the requests that are under way, the socket goes on to listen. Fresh connections are
# established, their requests are never read, and when the worker has ended they are reset. So a client sees neither "connection refused",
# after which any request can be sent elsewhere, nor a response. Other servers (gunicorn, uvicorn, Node, Go, Tomcat) refuse at once.
# Needs python3. Exit code: 0 as described, 1 the behaviour has changed, 2 it could not be run.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv && venv/bin/pip install -q --disable-pip-version-check hypercorn==0.18.0 || exit 2
cat >app.py <<'PY'
import asyncio


async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    if scope["path"] == "/slow":
        await asyncio.sleep(2.5)
    else:
        print("executed", scope["path"], flush=True)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"3")]})
    await send({"type": "http.response.body", "body": b"ok\n"})
PY
cat >client.py <<'PY'
import os, signal, socket, subprocess, sys, time

with socket.socket() as unused:
    unused.bind(("127.0.0.1", 0))
    port = unused.getsockname()[1]
log = open("log", "w")
server = subprocess.Popen(["venv/bin/hypercorn", "-b", f"127.0.0.1:{port}", "app:app"], stdout=log, stderr=subprocess.DEVNULL)


def connect():
    return socket.create_connection(("127.0.0.1", port), timeout=10)


def seen(connection):
    try:
        return connection.recv(4096).split(b"\r\n")[0].decode().strip() or "FIN"
    except ConnectionResetError:
        return "reset"


for _ in range(200):
    try:
        connect().close()
        break
    except ConnectionRefusedError:
        time.sleep(0.1)
busy = connect()
busy.sendall(b"GET /slow HTTP/1.1\r\nHost: localhost\r\n\r\n")
time.sleep(0.5)
server.send_signal(signal.SIGTERM)
time.sleep(0.5)
try:
    fresh, begun = connect(), time.monotonic()
    fresh.sendall(b"POST /fresh HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\nhi")
    print("fresh connection: established, then", seen(fresh))
    print("more than a second later:", time.monotonic() - begun > 1)
except ConnectionRefusedError:
    print("fresh connection: refused")
print("request under way:", seen(busy))
server.wait(20)
print("executed:", open("log").read().strip() or "nothing")
PY
python3 client.py | tee seen
diff seen - <<'WANTED'
fresh connection: established, then reset
more than a second later: True
request under way: HTTP/1.1 200
executed: nothing
WANTED
