"""Callers that share one HTTP/2 connection without TLS. A stream that GOAWAY or REFUSED_STREAM declares unprocessed is sent once more
over another connection, as RFC 9113, 8.7 allows."""

import asyncio

import h2.config
import h2.connection
import h2.events
import h2.exceptions

from soak.http1 import CONNECT_SECONDS, seen
from soak.outcome import CallError, refusal_of

REFUSED_STREAM = 7


class Unprocessed(Exception):
    """The server declares that it has not processed the request."""


class Connection(asyncio.Protocol):
    def __init__(self):
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self.streams = {}
        self.usable = True
        self.broken = "closed without an answer"

    def connection_made(self, transport):
        self.transport = transport
        self.h2.initiate_connection()
        self.flush()

    def flush(self):
        self.transport.write(self.h2.data_to_send())

    def data_received(self, data):
        try:
            events = self.h2.receive_data(data)
        except h2.exceptions.ProtocolError as error:
            self.broken = f"protocol error: {type(error).__name__}"
            self.transport.close()
            return
        for event in events:
            self.take(event)
        self.flush()

    def take(self, event):
        stream = self.streams.get(getattr(event, "stream_id", None))
        if isinstance(event, h2.events.ConnectionTerminated):
            self.usable = False
            for number, stream in self.streams.items():
                if number > event.last_stream_id:
                    stream.fail(Unprocessed())
        elif stream is None:
            return
        elif isinstance(event, h2.events.ResponseReceived):
            stream.fields = dict(event.headers)
        elif isinstance(event, h2.events.DataReceived):
            stream.body += event.data
            self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, h2.events.StreamEnded):
            stream.finish()
        elif isinstance(event, h2.events.StreamReset):
            code = int(event.error_code)
            stream.fail(Unprocessed() if code == REFUSED_STREAM else CallError(f"stream reset, code {code}"))

    def connection_lost(self, error):
        self.usable = False
        text = seen(error) if error else self.broken
        for stream in self.streams.values():
            stream.fail(CallError("cut in the body" if stream.fields else text))


class Stream:
    def __init__(self):
        self.fields, self.body = {}, b""
        self.ended = asyncio.get_running_loop().create_future()

    def finish(self):
        if not self.ended.done():
            self.ended.set_result(None)

    def fail(self, error):
        if not self.ended.done():
            self.ended.set_exception(error)


class Channel:
    """Opens a connection when there is none that takes further streams."""

    def __init__(self, port):
        self.port = port
        self.connection = None
        self.opening = asyncio.Lock()

    async def call(self, path):
        for last in (False, True):
            try:
                return await self._once(path)
            except Unprocessed as error:
                if last:
                    raise CallError("unprocessed twice") from error

    async def _once(self, path):
        connection = await self._usable()
        number, stream = connection.h2.get_next_available_stream_id(), Stream()
        connection.streams[number] = stream
        head = [(":method", "GET"), (":scheme", "http"), (":authority", "peer.test"), (":path", path)]
        connection.h2.send_headers(number, head, end_stream=True)
        connection.flush()
        try:
            await stream.ended
        except asyncio.CancelledError:
            self._cancel(connection, number)
            raise
        finally:
            connection.streams.pop(number, None)
        status = int(stream.fields.get(":status", 0))
        if status != 200:
            raise CallError(refusal_of(status, stream.fields))
        return stream.body

    @staticmethod
    def _cancel(connection, number):
        """After a timeout of the caller. No further stream uses the connection, as it may be mute."""
        connection.usable = False
        if not connection.transport.is_closing():
            connection.h2.reset_stream(number, error_code=8)
            connection.flush()

    async def _usable(self):
        async with self.opening:
            if not (self.connection and self.connection.usable):
                loop = asyncio.get_running_loop()
                try:
                    async with asyncio.timeout(CONNECT_SECONDS):
                        _, self.connection = await loop.create_connection(Connection, "127.0.0.1", self.port)
                except (OSError, TimeoutError) as error:
                    raise CallError("connect: " + seen(error)) from error
            return self.connection

    def close(self):
        if self.connection:
            self.connection.transport.close()
