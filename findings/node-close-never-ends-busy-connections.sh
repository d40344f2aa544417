#!/usr/bin/env bash
# Node 20.20.2, `server.close()`: idle connections are closed, but a connection on which a request is under way is answered with
# `Connection: keep-alive`, and every further request on it is served for as long as the client goes on. So the process never ends while a
# proxy or a pooled client keeps the connection busy; the documentation says that close() "closes all connections connected to this server
# which are not sending a request or waiting for a response", and nothing tells the client to leave.
# Needs node, python3; runs with the installed version of Node. Exit code: 0 as described, 1 the behaviour has changed, 2 it could not be run.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
command -v node >/dev/null || exit 2
cat >server.js <<'JS'
const server = require("node:http").createServer((request, response) => {
  setTimeout(() => response.end("ok\n"), request.url === "/slow" ? 500 : 5);
});
server.listen(0, "127.0.0.1", () => console.log(server.address().port));
process.on("SIGTERM", () => server.close(() => process.exit(0)));
JS
cat >client.py <<'PY'
import signal, socket, subprocess, sys, time

print("node", subprocess.run(["node", "--version"], capture_output=True, text=True).stdout.strip(), file=sys.stderr)
server = subprocess.Popen(["node", "server.js"], stdout=subprocess.PIPE, text=True)
port = int(server.stdout.readline())


def connect():
    return socket.create_connection(("127.0.0.1", port), timeout=10)


def response(connection):
    text = b""
    while not text.endswith(b"\r\n0\r\n\r\n") and not text.endswith(b"ok\n"):
        piece = connection.recv(4096)
        if not piece:
            return "closed"
        text += piece
    return text.lower()


busy, idle = connect(), connect()
idle.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
response(idle)
busy.sendall(b"GET /slow HTTP/1.1\r\nHost: localhost\r\n\r\n")
time.sleep(0.2)
server.send_signal(signal.SIGTERM)
answers = [response(busy)]
begun = time.monotonic()
while time.monotonic() - begun < 10 and answers[-1] != "closed":
    busy.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    answers.append(response(busy))
try:
    connect()
    print("fresh connection: accepted")
except ConnectionRefusedError:
    print("fresh connection: refused")
print("idle connection:", "closed" if idle.recv(1) == b"" else "open")
print("requests on the busy connection answered for 10 s:", len(answers) > 100 and "closed" not in answers)
print("responses with `Connection: close`:", sum(b"connection: close" in answer for answer in answers))
print("process ended:", server.poll() is not None)
server.kill()
PY
python3 client.py | tee seen
diff seen - <<'WANTED'
fresh connection: refused
idle connection: closed
requests on the busy connection answered for 10 s: True
responses with `Connection: close`: 0
process ended: False
WANTED
