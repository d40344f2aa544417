"""The load of one run: the same calls at the same moments, once directly and once through each side of hopguard.

Each caller has moments that follow from the seed, whatever became of its earlier calls. A caller whose call is still under way at the next
moment skips that moment.
"""

import asyncio
import random
import time
from dataclasses import dataclass

from soak import http1, http2, rpc
from soak.outcome import Call, CallError

# The callers' limit for a call, which is also hopguard's built-in `timeouts.request`.
CALL_SECONDS = 2
STREAM_SECONDS = 20
EVENTS, EVERY_MILLIS = 20, 75
PIECES, PIECE = 4, bytes(65536)
PIECE_PAUSE = 0.04


@dataclass
class Callers:
    """`count` callers with one call in `period` seconds each; `together`: all at the same moment."""

    kind: str
    count: int
    period: float
    together: bool = False


HTTP = [
    Callers("GET", 8, 0.25, together=True),
    Callers("GET spread", 4, 0.5),
    Callers("POST", 8, 0.3),
    Callers("upload", 2, 0.9),
    Callers("SSE", 2, 2.0),
    Callers("HTTP/2 GET", 4, 0.4),
]
GRPC = [
    Callers("gRPC", 8, 0.2, together=True),
    Callers("gRPC spread", 4, 0.5),
    Callers("gRPC stream", 3, 2.0),
]


class Load:
    def __init__(self, kind, target, port, seed):
        self.kind, self.target, self.port, self.seed = kind, target, port, seed
        self.calls = []
        self.skipped = 0
        self.closing = []

    async def run(self, begin, end):
        sets = GRPC if self.kind.grpc else HTTP
        shared = self.shared()
        async with asyncio.TaskGroup() as group:
            for callers in sets:
                for number in range(callers.count):
                    group.create_task(self.caller(callers, number, shared, begin, end))
        for close in self.closing:
            result = close()
            if asyncio.iscoroutine(result):
                await result

    def shared(self):
        """The connection that HTTP/2 and gRPC callers share. A server without HTTP/2 is called over HTTP/1.1 directly."""
        if self.kind.grpc:
            shared = rpc.Channel(self.port)
        elif self.kind.http2 or self.target != "direct":
            shared = http2.Channel(self.port)
        else:
            return None
        self.closing.append(shared.close)
        return shared

    async def caller(self, callers, number, shared, begin, end):
        source = random.Random(f"{self.seed}/{self.kind.name}/{callers.kind}/{0 if callers.together else number}")
        own = http1.Caller(self.port)
        due = begin + source.random() * callers.period
        count = 0
        while due < end:
            late = time.monotonic() - due
            if late > callers.period / 2:
                self.skipped += 1
            else:
                await asyncio.sleep(max(0, -late))
                count += 1
                identity = f"{self.target}:{callers.kind.replace(' ', '-')}:{number}:{count}"
                await self.call(callers.kind, identity, own, shared)
            due += callers.period * (0.7 + 0.6 * source.random())
        own.close()

    async def call(self, kind, identity, own, shared):
        begun, failure = time.monotonic(), None
        limit = STREAM_SECONDS if kind in ("SSE", "gRPC stream") else CALL_SECONDS
        try:
            async with asyncio.timeout(limit):
                await CALLS[kind](identity, own, shared)
        except CallError as error:
            failure = str(error)
        except TimeoutError:
            failure = "no answer in time"
        self.calls.append(Call(kind, identity, begun, time.monotonic(), failure))


def wanted(answer, expected):
    if answer != expected:
        raise CallError("a wrong or incomplete body")


async def get(_, own, __):
    wanted(await own.call("GET", "/get?ms=10"), b"ok\n")


async def post(identity, own, _):
    wanted(await own.call("POST", "/post?ms=10", [("x-id", identity)], [b"hello"]), b"ok\n")


async def upload(identity, own, _):
    answer = await own.call("POST", "/upload", [("x-id", identity)], [PIECE] * PIECES, PIECE_PAUSE)
    if answer != b"ok\n":  # nginx reads the body and does not count it
        wanted(answer, b"%d\n" % (PIECES * len(PIECE)))


async def events(_, own, __):
    answer = await own.call("GET", f"/events?count={EVENTS}&every={EVERY_MILLIS}")
    if answer.count(b"data: ") != EVENTS:
        raise CallError("cut in the body")


async def http2_get(_, own, shared):
    answer = shared.call("/get?ms=10") if shared else own.call("GET", "/get?ms=10")
    wanted(await answer, b"ok\n")


async def grpc_unary(identity, _, shared):
    wanted(await shared.unary(identity, 10), b"10")


async def grpc_events(_, __, shared):
    if await shared.events(EVENTS, EVERY_MILLIS) != EVENTS:
        raise CallError("cut in the stream")


CALLS = {
    "GET": get,
    "GET spread": get,
    "POST": post,
    "upload": upload,
    "SSE": events,
    "HTTP/2 GET": http2_get,
    "gRPC": grpc_unary,
    "gRPC spread": grpc_unary,
    "gRPC stream": grpc_events,
}
