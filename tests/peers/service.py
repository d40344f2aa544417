"""A service between others, as users write them with aiohttp: it asks the next service and answers in its words, or, where
there is none, works for a while. Its twin is service.go.

Prints {"port": N} when it listens. Each line that it reads changes its settings, as in {"take_ms": 20}; it answers with all
the calls that it has had, as one line of JSON. Ends when its standard input does.
"""

import asyncio
import json
import sys
import time

import aiohttp
from aiohttp import web

SETTINGS = {"next": "", "forward": "nothing", "pause_ms": 0, "take_ms": 0}
CALLS = []
CLIENT = web.AppKey("client", aiohttp.ClientSession)
CONNECTION_LEVEL = {"connection", "content-length", "host", "keep-alive", "te", "transfer-encoding"}


def passed_on(fields, forward):
    """The fields of a call that go into the one that it causes."""
    if forward == "all":
        return {name: value for name, value in fields.items() if name.lower() not in CONNECTION_LEVEL}
    if forward == "trace" and "traceparent" in fields:
        return {"traceparent": fields["traceparent"]}
    return {}


async def call_on(request, settings, call):
    """Does not look whether its own caller is still there, as most do not."""
    await asyncio.sleep(settings["pause_ms"] / 1000)
    fields = passed_on(request.headers, settings["forward"])
    async with request.app[CLIENT].get(f"http://{settings['next']}{request.path}", headers=fields) as answer:
        body = await answer.read()
        call["status"] = answer.status
        return web.Response(status=answer.status, body=body, content_type=answer.content_type)


async def work(request, settings, call):
    """Ends early where the caller has closed the connection."""
    until = time.monotonic() + settings["take_ms"] / 1000
    while time.monotonic() < until and not call["left"]:
        await asyncio.sleep(0.005)
        call["left"] = request.transport is None or request.transport.is_closing()
    return web.Response(text="done")


async def answer(request):
    began, settings = time.monotonic(), dict(SETTINGS)
    fields = {name.lower(): value for name, value in request.headers.items()}
    call = {"fields": fields, "status": 0, "left": False, "over": False, "ms": 0}
    CALLS.append(call)
    try:
        return await (call_on if settings["next"] else work)(request, settings, call)
    finally:
        call.update(over=True, ms=(time.monotonic() - began) * 1000)


async def main():
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as client:
        app = web.Application()
        app[CLIENT] = client
        app.add_routes([web.get("/{path:.*}", answer)])
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        print(json.dumps({"port": runner.addresses[0][1]}), flush=True)
        loop = asyncio.get_running_loop()
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            SETTINGS.update(json.loads(line))
            print(json.dumps(CALLS), flush=True)
        await runner.cleanup()


if __name__ == "__main__":
    asyncio.run(main())
