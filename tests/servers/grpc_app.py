"""The gRPC test service on grpcio, without generated code. README.md describes its methods.

MAX_AGE and MAX_GRACE, in milliseconds, set the age after which the server ends a connection with GOAWAY.
"""

import os
import signal
import threading
import time
from concurrent import futures

import grpc

RECORD = os.environ.get("RECORD", os.devnull)
AGES = {"MAX_AGE": "grpc.max_connection_age_ms", "MAX_GRACE": "grpc.max_connection_age_grace_ms"}
GRACE = 30


def record(identity):
    """One write with O_APPEND: lines of several processes do not mix."""
    file = os.open(RECORD, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(file, f"{identity}\n".encode())
    os.close(file)


def unary(request, context):
    identity = dict(context.invocation_metadata()).get("x-id")
    if identity:
        record(identity)
    time.sleep(int(request or 0) / 1000)
    return request


def events(request, context):
    count, every = map(int, request.split())
    for number in range(count):
        yield b"event %d" % number
        time.sleep(every / 1000)


def main():
    options = [(name, int(os.environ[variable])) for variable, name in AGES.items() if variable in os.environ]
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=64), options=options)
    methods = {
        "Unary": grpc.unary_unary_rpc_method_handler(unary),
        "Events": grpc.unary_stream_rpc_method_handler(events),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("peer.Peer", methods),))
    server.add_insecure_port(f"127.0.0.1:{os.environ['PORT']}")
    server.start()
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    ended.wait()
    server.stop(GRACE).wait()


if __name__ == "__main__":
    main()
