"""WebSocket (websockets) and event (httpx, httpx-sse) clients: `streams_client.py HOST:PORT CASE…`.

Prints one line of JSON: for each case what came of it, or {"error": …} where Python itself gave up.
"""

import asyncio
import json
import sys
import time

import httpx
from httpx_sse import aconnect_sse
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

PATIENCE = 15


async def ws_long(target):
    """Messages for longer than a request may take, then an orderly close."""
    began, answers = time.monotonic(), []
    async with connect(f"ws://{target}/chat", subprotocols=["chat"], proxy=None) as socket:
        for number in range(6):
            await socket.send(f"message {number}")
            answers.append(await socket.recv())
            await asyncio.sleep(0.25)
        pong = await socket.ping()
        await asyncio.wait_for(pong, PATIENCE)
        protocol = socket.subprotocol
    ms = round((time.monotonic() - began) * 1000)
    return {"answers": answers, "subprotocol": protocol, "close": socket.close_code, "ms": ms}


async def ws_large(target):
    """A binary message of 1 MiB, and one in many fragments."""
    message = bytes(range(256)) * 4096

    async def fragments():
        for start in range(0, len(message), 4096):
            yield message[start : start + 4096]

    async with connect(f"ws://{target}/chat", subprotocols=["chat"], max_size=4 << 20, proxy=None) as socket:
        await socket.send(message)
        whole = await socket.recv() == message
        await socket.send(fragments())
        return {"whole": whole, "fragments": await socket.recv() == message}


async def ws_closed_by_server(target):
    async with connect(f"ws://{target}/chat", subprotocols=["chat"], proxy=None) as socket:
        await socket.send("close me")
        try:
            await socket.recv()
        except ConnectionClosed as closed:
            return {"code": closed.rcvd.code, "reason": closed.rcvd.reason}
    return {}


async def ws_many(target):
    """Fifty at once."""

    async def one(number):
        async with connect(f"ws://{target}/chat", subprotocols=["chat"], proxy=None) as socket:
            await socket.send(f"{number}")
            return await socket.recv() == f"{number}"

    return {"right": sum(await asyncio.gather(*(one(n) for n in range(50))))}


async def read_events(target, name, count, every, stop_after=None, headers=None):
    got, began = [], time.monotonic()
    query = f"name={name}&count={count}&every={every}"
    async with httpx.AsyncClient(timeout=PATIENCE, trust_env=False) as client:
        url = f"http://{target}/events?{query}"
        async with aconnect_sse(client, "GET", url, headers=headers or {}) as source:
            async for event in source.aiter_sse():
                got.append([event.id, event.data])
                if len(got) == stop_after:
                    break
                await client.post(f"http://{target}/ack?name={name}")
            status, kind = source.response.status_code, source.response.headers["content-type"]
    ms = round((time.monotonic() - began) * 1000)
    return {"events": got, "status": status, "type": kind, "ms": ms}


async def sse_long(target):
    """Events for longer than a request may take."""
    return await read_events(target, "long", 6, 250, headers={"Last-Event-ID": "41"})


async def sse_quick(target):
    """Fifty events, each confirmed before the next: any that is held back stops them all."""
    return await read_events(target, "quick", 50, 0)


async def sse_left(target):
    """The client goes away in the middle."""
    return await read_events(target, "left", 10, 0, stop_after=2)


async def main():
    report = {}
    for name in sys.argv[2:]:
        try:
            report[name] = await asyncio.wait_for(globals()[name](sys.argv[1]), PATIENCE)
        except Exception as error:  # noqa: BLE001  what it was is the test's to judge
            report[name] = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
