"""A caller with one persistent HTTP/1.1 connection. It sends each request once, on a connection that it has not seen closed."""

import asyncio

from soak.outcome import CallError, refusal_of

CONNECT_SECONDS = 2


class Caller:
    def __init__(self, port, keep=True):
        self.port = port
        self.keep = keep
        self.reader = self.writer = None

    async def call(self, method, path, fields=(), body=(), pause=0):
        """Returns the body of a response with status 200; raises CallError. `body` is a list of pieces, with a pause after each."""
        await self._connect()
        try:
            status, answer_fields, answer = await self._exchange(method, path, fields, body, pause)
        except (ConnectionError, asyncio.IncompleteReadError, TimeoutError) as error:
            self.close()
            raise CallError(seen(error)) from error
        except BaseException:
            self.close()
            raise
        if answer_fields.get("connection", "").lower() == "close" or not self.keep:
            self.close()
        if status != 200:
            raise CallError(refusal_of(status, answer_fields))
        return answer

    async def _connect(self):
        if self.writer and not self.reader.at_eof() and not self.writer.is_closing():
            return
        self.close()
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        except (OSError, TimeoutError) as error:
            raise CallError("connect: " + seen(error)) from error

    async def _exchange(self, method, path, fields, body, pause):
        lines = [f"{method} {path} HTTP/1.1", "host: peer.test", *(f"{name}: {value}" for name, value in fields)]
        if not self.keep:
            lines.append("connection: close")
        if method == "POST":
            lines.append(f"content-length: {sum(map(len, body))}")
        self.writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())
        for piece in body:
            self.writer.write(piece)
            await self.writer.drain()
            if pause:
                await asyncio.sleep(pause)
        try:
            head = await self.reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError as error:
            raise ConnectionError("closed in the head" if error.partial else "closed without an answer") from error
        status, answer_fields = parsed(head)
        return status, answer_fields, await self._body(answer_fields)

    async def _body(self, fields):
        try:
            if "content-length" in fields:
                return await self.reader.readexactly(int(fields["content-length"]))
            if fields.get("transfer-encoding") == "chunked":
                return await self._chunks()
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise ConnectionError("cut in the body") from error
        self.keep_none()
        return await self.reader.read()

    async def _chunks(self):
        pieces = []
        while size := int(await self.reader.readuntil(b"\r\n"), 16):
            pieces.append((await self.reader.readexactly(size + 2))[:-2])
        await self.reader.readexactly(2)
        return b"".join(pieces)

    def keep_none(self):
        """The end of the connection ends the body."""
        self.writer.write_eof()

    def close(self):
        if self.writer:
            self.writer.close()
        self.reader = self.writer = None


def parsed(head):
    first, *rest = head.decode("latin-1").rstrip().split("\r\n")
    fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in rest)}
    return int(first.split()[1]), fields


def seen(error):
    """The failure without addresses and error numbers."""
    if isinstance(error, ConnectionRefusedError):
        return "refused"
    if isinstance(error, (ConnectionResetError, BrokenPipeError)):
        return "reset"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return str(error)
