"""The test service as an ASGI application, for uvicorn and hypercorn. README.md describes its paths."""

import asyncio
import os

RECORD = os.environ.get("RECORD", os.devnull)


def record(identity):
    """One write with O_APPEND: lines of several processes do not mix."""
    file = os.open(RECORD, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(file, f"{identity}\n".encode())
    os.close(file)


async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        return await lifespan(receive, send)
    settings = dict(part.split("=") for part in scope["query_string"].decode().split("&") if part)
    if scope["path"] == "/events":
        return await events(send, int(settings["count"]), int(settings["every"]) / 1000)
    length = await body_length(receive)
    if length is None:
        return None
    answer = b"%d\n" % length if scope["path"] == "/upload" else b"ok\n"
    identity = dict(scope["headers"]).get(b"x-id")
    if identity:
        record(identity.decode())
    await asyncio.sleep(int(settings.get("ms", 0)) / 1000)
    fields = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(answer))]
    await send({"type": "http.response.start", "status": 200, "headers": fields})
    await send({"type": "http.response.body", "body": answer})


async def lifespan(receive, send):
    while True:
        message = await receive()
        await send({"type": message["type"] + ".complete"})
        if message["type"] == "lifespan.shutdown":
            return


async def body_length(receive):
    """None if the caller has left before the end."""
    length, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        length += len(message.get("body", b""))
        more = message.get("more_body", False)
    return length


async def events(send, count, every):
    fields = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": 200, "headers": fields})
    for number in range(count):
        event = b"id: %d\ndata: event %d\n\n" % (number, number)
        await send({"type": "http.response.body", "body": event, "more_body": True})
        await asyncio.sleep(every)
    await send({"type": "http.response.body", "body": b""})
