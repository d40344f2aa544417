"""A WebSocket server (websockets) and a server of events (aiohttp), each on a port of its own.

Prints {"ws": N, "sse": N} when both listen. Then, for each line that it reads, what they have seen, as one line of
JSON; a line like ["closed", 2] makes it wait for that first. Ends when its standard input does.
"""

import asyncio
import json
import sys

from aiohttp import web
from websockets.asyncio.server import serve

PATIENCE = 10
SEEN = {"closed": [], "left": 0, "last_event_id": None}
CHANGED = asyncio.Condition()
ACKS = {}


async def note(part, value):
    """Keeps what happened and wakes who waits for it."""
    async with CHANGED:
        SEEN[part] = value
        CHANGED.notify_all()


async def report(wanted):
    """What was seen, once there is as much of it as wanted, or after some seconds all the same."""

    def there():
        part, count = wanted
        return (len(SEEN[part]) if isinstance(SEEN[part], list) else SEEN[part]) == count

    if wanted:
        try:
            async with CHANGED:
                await asyncio.wait_for(CHANGED.wait_for(there), PATIENCE)
        except TimeoutError:
            pass
    return json.dumps(SEEN)


async def talk(connection):
    """Echoes, and notes with which code the client closed."""
    async for message in connection:
        if message == "close me":
            await connection.close(4001, "as asked")
            return
        await connection.send(message)
    await note("closed", [*SEEN["closed"], connection.close_code])


async def events(request):
    """Each event waits until the client has confirmed the one before, so nothing may be held back on the way."""
    if "Last-Event-ID" in request.headers:
        await note("last_event_id", request.headers["Last-Event-ID"])
    count, every = int(request.query["count"]), int(request.query.get("every", 0)) / 1000
    acks = ACKS.setdefault(request.query["name"], asyncio.Queue())
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
    await response.prepare(request)
    try:
        for number in range(count):
            await response.write(f"id: {number}\ndata: event {number}\n\n".encode())
            await asyncio.wait_for(acks.get(), 10)
            await asyncio.sleep(every)
    except (ConnectionError, asyncio.CancelledError):
        await asyncio.shield(note("left", SEEN["left"] + 1))
        raise
    return response


async def ack(request):
    await ACKS.setdefault(request.query["name"], asyncio.Queue()).put(None)
    return web.Response(text="ok")


async def main():
    app = web.Application()
    app.add_routes([web.get("/events", events), web.post("/ack", ack)])
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    async with serve(talk, "127.0.0.1", 0, subprotocols=["chat"], max_size=4 << 20) as server:
        ports = {"ws": server.sockets[0].getsockname()[1], "sse": runner.addresses[0][1]}
        print(json.dumps(ports), flush=True)
        loop = asyncio.get_running_loop()
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            print(await report(json.loads(line)), flush=True)
    await runner.cleanup()


if __name__ == "__main__":
    asyncio.run(main())
