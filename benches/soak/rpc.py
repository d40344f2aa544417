"""gRPC calls of grpcio, each channel with connections of its own."""

import grpc
import grpc.aio

from soak.outcome import CallError

OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),
    # An outage ends for the caller soon after it ends for the server.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 200),
]


class Channel:
    def __init__(self, port):
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", OPTIONS)
        self.unary_method = self.channel.unary_unary("/peer.Peer/Unary")
        self.events_method = self.channel.unary_stream("/peer.Peer/Events")

    async def unary(self, identity, millis):
        try:
            return await self.unary_method(str(millis).encode(), metadata=(("x-id", identity),))
        except grpc.aio.AioRpcError as error:
            raise CallError(seen(error)) from error

    async def events(self, count, every):
        number = 0
        try:
            async for _ in self.events_method(f"{count} {every}".encode()):
                number += 1
        except grpc.aio.AioRpcError as error:
            raise CallError(("cut in the stream: " if number else "") + seen(error)) from error
        return number

    async def close(self):
        await self.channel.close()


def seen(error):
    """Code and message, without addresses and local numbers."""
    details = (error.details() or "").partition(":")[0]
    return f"{error.code().name} {details}"[:100]
