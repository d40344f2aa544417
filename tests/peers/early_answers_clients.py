"""Uploads with clients of several languages, at their defaults, and prints as JSON what each got, how often.

    early_answers_clients.py URL BYTES COUNT CLIENT...

Clients: http.client, requests, curl, fetch and http (Node), go (with the path of the program behind a colon), java.
"""

import collections
import http.client
import json
import os
import subprocess
import sys
import tempfile
import urllib.parse

FOLDER = os.path.dirname(os.path.abspath(__file__))
URL, BYTES, COUNT = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])


def repeated(upload):
    seen = collections.Counter()
    for _ in range(COUNT):
        try:
            seen[str(upload())] += 1
        except OSError as error:
            seen[type(error).__name__] += 1
    return dict(seen)


def with_http_client():
    body, address = b"x" * BYTES, urllib.parse.urlsplit(URL)

    def upload():
        wire = http.client.HTTPConnection(address.netloc, timeout=20)
        try:
            wire.request("POST", address.path, body=body)
            response = wire.getresponse()
            response.read()
            return response.status
        finally:
            wire.close()

    return repeated(upload)


def with_requests():
    import requests

    body = b"x" * BYTES
    return repeated(lambda: requests.post(URL, data=body, timeout=20).status_code)


def with_curl():
    with tempfile.NamedTemporaryFile() as body:
        body.write(b"x" * BYTES)
        body.flush()

        def upload():
            # Without `Expect: 100-continue`, with which curl would wait for the response before it sends the body.
            command = ["curl", "-s", "-o", os.devnull, "-w", "%{http_code}", "-m", "20", "-H", "Expect:",
                       "-H", "Content-Type: application/octet-stream", "--data-binary", "@" + body.name, URL]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            return done.stdout if done.stdout != "000" else f"curl: {done.returncode}"

        return repeated(upload)


def program(*command):
    command = [*command, URL, str(BYTES), str(COUNT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=FOLDER)
    return json.loads(done.stdout) if done.returncode == 0 else {done.stderr[-300:]: COUNT}


def run(client):
    name, _, path = client.partition(":")
    if name == "go":
        return program(path, "client")
    if name == "java":
        return program("java", "EarlyAnswers.java")
    if name in ("fetch", "http"):
        return program("node", "early_answers.mjs", name)
    return {"http.client": with_http_client, "requests": with_requests, "curl": with_curl}[name]()


print(json.dumps({client.partition(":")[0]: run(client) for client in sys.argv[4:]}))
