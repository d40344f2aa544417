"""A gRPC server without generated code: all four kinds of calls, on messages that are plain bytes.

Prints {"port": N} when it listens. Then, for each line that it reads, what it has seen, as one line of JSON; a line
like ["cancelled", "Slow", 2] makes it wait for that first. Ends when its standard input does.
"""

import json
import sys
import threading
import time
from concurrent import futures

import grpc

OPTIONS = [
    ("grpc.max_receive_message_length", 16 << 20),
    ("grpc.max_send_message_length", 16 << 20),
    ("grpc.so_reuseport", 0),
]
PATIENCE = 10


class Seen:
    """Counts, kept until they are asked for."""

    def __init__(self):
        self.lock = threading.Condition()
        self.calls = {}
        self.cancelled = {}
        self.metadata = {}

    def call(self, name, context):
        """Notes a call, and later whether its caller gave it up."""
        with self.lock:
            self.calls[name] = self.calls.get(name, 0) + 1
            self.metadata[name] = [
                [key, value.hex() if isinstance(value, bytes) else value]
                for key, value in context.invocation_metadata()
            ]
            self.lock.notify_all()

    def cancel(self, name):
        with self.lock:
            self.cancelled[name] = self.cancelled.get(name, 0) + 1
            self.lock.notify_all()

    def report(self, wanted):
        """What was seen, once it is as wanted, or after some seconds all the same."""
        with self.lock:
            if wanted:
                part, name, count = wanted
                self.lock.wait_for(lambda: vars(self)[part].get(name) == count, PATIENCE)
            return json.dumps(
                {"calls": self.calls, "cancelled": self.cancelled, "metadata": self.metadata}
            )


SEEN = Seen()


def answer_metadata(context):
    """Sends back what came in x-in and x-in-bin, before the answer and behind it."""
    got = dict(context.invocation_metadata())
    context.send_initial_metadata(
        (("x-out", got.get("x-in", "")), ("x-out-bin", got.get("x-in-bin", b"")))
    )
    context.set_trailing_metadata(
        (("x-trailer", got.get("x-in", "")), ("x-trailer-bin", got.get("x-in-bin", b"")))
    )


def echo(request, context):
    SEEN.call("Echo", context)
    answer_metadata(context)
    return request


def fail(request, context):
    """Ends with the code and the message that it is told."""
    SEEN.call("Fail", context)
    wanted = json.loads(request)
    code = next(c for c in grpc.StatusCode if c.value[0] == wanted["code"])
    context.set_trailing_metadata((("x-reason", "as asked"),))
    context.abort(code, wanted["message"])


def slow(request, context):
    """Answers after so many milliseconds, unless its caller gives it up before."""
    SEEN.call("Slow", context)
    given_up = threading.Event()
    context.add_callback(given_up.set)
    if given_up.wait(int(request) / 1000):
        SEEN.cancel("Slow")
        return b""
    return b"late"


def upload(requests, context):
    SEEN.call("Upload", context)
    context.send_initial_metadata(())
    count = size = 0
    for request in requests:
        count += 1
        size += len(request)
    return json.dumps({"count": count, "size": size}).encode()


def download(request, context):
    """So many messages, with so many milliseconds before the first and between them, and a status in the end."""
    SEEN.call("Download", context)
    wanted = json.loads(request)
    time.sleep(wanted.get("first", 0) / 1000)
    for number in range(wanted["count"]):
        if number and wanted.get("every"):
            time.sleep(wanted["every"] / 1000)
        yield b"%d" % number + b"." * wanted.get("size", 0)
    context.set_trailing_metadata((("x-sent", str(wanted["count"])),))
    if wanted.get("fail"):
        context.abort(grpc.StatusCode.DATA_LOSS, wanted["fail"])


def chat(requests, context):
    SEEN.call("Chat", context)
    for request in requests:
        yield b"re:" + request


def hang(request, context):
    """One message, and then nothing until the caller gives up."""
    SEEN.call("Hang", context)
    over, waited_out = threading.Event(), threading.Event()

    def ended():
        # Noted here: grpcio does not go on with a generator whose call is over by the time its message is sent.
        if not waited_out.is_set():
            SEEN.cancel("Hang")
        over.set()

    context.add_callback(ended)
    yield b"first"
    if not over.wait(30):
        waited_out.set()


def main():
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=256), options=OPTIONS)
    unary = grpc.method_handlers_generic_handler(
        "shop.v1.Peer",
        {
            "Echo": grpc.unary_unary_rpc_method_handler(echo),
            "Fail": grpc.unary_unary_rpc_method_handler(fail),
            "Slow": grpc.unary_unary_rpc_method_handler(slow),
        },
    )
    streams = grpc.method_handlers_generic_handler(
        "shop.v1.Streams",
        {
            "Upload": grpc.stream_unary_rpc_method_handler(upload),
            "Download": grpc.unary_stream_rpc_method_handler(download),
            "Chat": grpc.stream_stream_rpc_method_handler(chat),
            "Hang": grpc.unary_stream_rpc_method_handler(hang),
        },
    )
    server.add_generic_rpc_handlers((unary, streams))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(json.dumps({"port": port}), flush=True)
    for line in sys.stdin:
        print(SEEN.report(json.loads(line)), flush=True)
    server.stop(0)


if __name__ == "__main__":
    main()
