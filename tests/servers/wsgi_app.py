"""The test service as a WSGI application, for gunicorn and waitress. README.md describes its paths."""

import os
import time

RECORD = os.environ.get("RECORD", os.devnull)


def record(identity):
    """One write with O_APPEND: lines of several processes do not mix."""
    file = os.open(RECORD, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(file, f"{identity}\n".encode())
    os.close(file)


def app(environ, start_response):
    path, query = environ["PATH_INFO"], environ.get("QUERY_STRING", "")
    settings = dict(part.split("=") for part in query.split("&") if part)
    if path == "/events":
        start_response("200 OK", [("Content-Type", "text/event-stream"), ("Cache-Control", "no-store")])
        return events(int(settings["count"]), int(settings["every"]) / 1000)
    answer = b"%d\n" % os.getpid() if path == "/pid" else b"ok\n"
    if path == "/upload":
        answer = b"%d\n" % length_of(environ["wsgi.input"], int(environ.get("CONTENT_LENGTH") or 0))
    elif environ["REQUEST_METHOD"] == "POST":
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    if "HTTP_X_ID" in environ:
        record(environ["HTTP_X_ID"])
    time.sleep(int(settings.get("ms", 0)) / 1000)
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(answer)))])
    return [answer]


def length_of(body, announced):
    length = 0
    while length < announced and (piece := body.read(min(65536, announced - length))):
        length += len(piece)
    return length


def events(count, every):
    for number in range(count):
        yield b"id: %d\ndata: event %d\n\n" % (number, number)
        time.sleep(every)
