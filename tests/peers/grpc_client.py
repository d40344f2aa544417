"""A gRPC client without generated code: `grpc_client.py HOST:PORT CASE…`.

Prints one line of JSON: for each case what came of it, or {"error": …} where Python itself gave up.
"""

import json
import sys
import threading
import time

import grpc

OPTIONS = [
    ("grpc.max_receive_message_length", 16 << 20),
    ("grpc.max_send_message_length", 16 << 20),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
]
PATIENCE = 20


class Peer:
    """The methods of the server, as callables."""

    def __init__(self, target):
        self.channel = grpc.insecure_channel(target, options=OPTIONS)
        self.echo = self.channel.unary_unary("/shop.v1.Peer/Echo")
        self.fail = self.channel.unary_unary("/shop.v1.Peer/Fail")
        self.slow = self.channel.unary_unary("/shop.v1.Peer/Slow")
        self.missing = self.channel.unary_unary("/shop.v1.Peer/Missing")
        self.upload = self.channel.stream_unary("/shop.v1.Streams/Upload")
        self.download = self.channel.unary_stream("/shop.v1.Streams/Download")
        self.chat = self.channel.stream_stream("/shop.v1.Streams/Chat")
        self.hang = self.channel.unary_stream("/shop.v1.Streams/Hang")


def pairs(metadata):
    return {k: v.hex() if isinstance(v, bytes) else v for k, v in metadata or ()}


def failure(error, began):
    """What a failed call says of itself."""
    return {
        "code": error.code().name,
        "details": error.details(),
        "trailers": pairs(error.trailing_metadata()),
        "ms": round((time.monotonic() - began) * 1000),
    }


def attempt(call):
    """The result of a call, or its failure."""
    began = time.monotonic()
    try:
        return call()
    except grpc.RpcError as error:
        return failure(error, began)


def unary(peer):
    metadata = (("x-in", "value 1"), ("x-in-bin", b"\x00\xff\x80"))
    answer, call = peer.echo.with_call(b"hello", metadata=metadata, timeout=PATIENCE)
    return {
        "answer": answer.decode(),
        "code": call.code().name,
        "initial": pairs(call.initial_metadata()),
        "trailers": pairs(call.trailing_metadata()),
    }


def empty(peer):
    return {"size": len(peer.echo(b"", timeout=PATIENCE))}


def error_status(peer):
    request = json.dumps({"code": 5, "message": "kein Café übrig ☕ – 50%\nzweite Zeile"})
    return attempt(lambda: peer.fail(request.encode(), timeout=PATIENCE))


def error_statuses(peer):
    """Every status but OK passes as it is."""

    def code(number):
        request = json.dumps({"code": number, "message": f"status {number}"}).encode()
        return attempt(lambda: peer.fail(request, timeout=PATIENCE))["code"]

    return {"codes": [code(number) for number in range(1, 17)]}


def unknown_method(peer):
    return attempt(lambda: peer.missing(b"", timeout=PATIENCE))


def client_stream(peer):
    return json.loads(peer.upload(iter([b"x" * 1000] * 50), timeout=PATIENCE))


def client_stream_long(peer):
    """Messages sent for longer than a unary call may take."""

    def messages():
        for _ in range(6):
            yield b"x"
            time.sleep(0.25)

    return attempt(lambda: json.loads(peer.upload(messages(), timeout=PATIENCE)))


def server_stream(peer):
    call = peer.download(json.dumps({"count": 100, "size": 500}).encode(), timeout=PATIENCE)
    return {"count": len(list(call)), "trailers": pairs(call.trailing_metadata())}


def server_stream_long(peer):
    """Messages received for longer than a unary call may take."""
    request = json.dumps({"count": 6, "every": 250}).encode()
    began = time.monotonic()

    def run():
        messages = [m.decode() for m in peer.download(request, timeout=PATIENCE)]
        return {"messages": messages, "ms": round((time.monotonic() - began) * 1000)}

    return attempt(run)


def server_stream_late(peer):
    """The first message comes later than a unary call may take; grpcio sends its head with it."""
    request = json.dumps({"count": 2, "first": 900}).encode()
    return attempt(lambda: {"messages": [m.decode() for m in peer.download(request, timeout=PATIENCE)]})


def server_stream_failing(peer):
    """Messages, and then an error with a message of its own."""
    call = peer.download(json.dumps({"count": 3, "fail": "verloren: ß"}).encode(), timeout=PATIENCE)
    messages, began = [], time.monotonic()
    try:
        for message in call:
            messages.append(message.decode())
    except grpc.RpcError as error:
        return {"messages": messages, **failure(error, began)}
    return {"messages": messages}


def both_stream(peer):
    """Each message is sent only when the one before has been answered, so nothing may be held back."""
    answered = threading.Semaphore(1)

    def messages():
        for number in range(20):
            if not answered.acquire(timeout=PATIENCE):
                return
            yield b"%d" % number

    answers = []
    for answer in peer.chat(messages(), timeout=PATIENCE):
        answers.append(answer.decode())
        answered.release()
    return {"answers": answers}


def both_stream_long(peer):
    def messages():
        for number in range(6):
            yield b"%d" % number
            time.sleep(0.25)

    return attempt(lambda: {"count": len(list(peer.chat(messages(), timeout=PATIENCE)))})


def deadline_of_client(peer):
    return attempt(lambda: {"answer": peer.slow(b"3000", timeout=0.15).decode()})


def deadline_of_proxy(peer):
    return attempt(lambda: {"answer": peer.slow(b"3000", timeout=PATIENCE).decode()})


def cancel_unary(peer):
    call = peer.slow.future(b"3000", timeout=PATIENCE)
    threading.Timer(0.1, call.cancel).start()
    try:
        call.result()
    except grpc.FutureCancelledError:
        return {"code": call.code().name}
    except grpc.RpcError as error:
        return {"code": error.code().name}
    return {}


def cancel_stream(peer):
    """Given up after the first message."""
    call = peer.hang(b"", timeout=PATIENCE)
    first = next(call)
    call.cancel()
    try:
        next(call)
    except grpc.RpcError as error:
        return {"first": first.decode(), "code": error.code().name}
    return {}


def large(peer):
    message = bytes(range(256)) * 16384
    return {"size": len(message), "same": peer.echo(message, timeout=PATIENCE) == message}


def large_streams(peer):
    """Ten messages of 1 MiB each way at once."""
    answers = peer.chat(iter([b"z" * (1 << 20)] * 10), timeout=PATIENCE)
    return {"sizes": [len(a) for a in answers]}


def many(peer):
    """Two hundred calls at once on one connection."""
    calls = [(b"%d" % n, peer.echo.future(b"%d" % n, timeout=PATIENCE)) for n in range(200)]
    return {"right": sum(call.result() == wanted for wanted, call in calls)}


def down(peer):
    return attempt(lambda: {"answer": peer.echo(b"x", timeout=PATIENCE).decode()})


CASES = {
    name: value
    for name, value in list(globals().items())
    if callable(value) and getattr(value, "__code__", None) and value.__code__.co_varnames[:1] == ("peer",)
}


def main():
    peer = Peer(sys.argv[1])
    report = {}
    for name in sys.argv[2:]:
        try:
            report[name] = CASES[name](peer)
        except Exception as error:  # noqa: BLE001  what it was is the test's to judge
            report[name] = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
