"""A gRPC server on grpcio whose connections have an age: `server.py AGE_MS GRACE_MS`; without an age if AGE_MS is 0.

Unary answers after 20 ms with what it got, Watch sends a message every 50 ms without an end, Never does not answer. Prints
{"port": N} when it listens, and for each line that it reads {"seen": [...]}, what the calls of Unary contained.
"""

import json
import sys
import threading
import time
from concurrent import futures

import grpc

age, grace = int(sys.argv[1]), int(sys.argv[2])
seen = []


def unary(request, context):
    seen.append(request.decode())
    time.sleep(0.02)
    return request


def watch(request, context):
    while context.is_active():
        yield b"tick"
        time.sleep(0.05)


def never(request, context):
    ended = threading.Event()
    context.add_callback(ended.set)
    ended.wait()
    return b""


options = [("grpc.so_reuseport", 0)]
if age:
    options += [("grpc.max_connection_age_ms", age), ("grpc.max_connection_age_grace_ms", grace)]
server = grpc.server(futures.ThreadPoolExecutor(64), options=options)
handlers = {
    "Unary": grpc.unary_unary_rpc_method_handler(unary),
    "Watch": grpc.unary_stream_rpc_method_handler(watch),
    "Never": grpc.unary_unary_rpc_method_handler(never),
}
server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("age.Age", handlers),))
port = server.add_insecure_port("127.0.0.1:0")
server.start()
print(json.dumps({"port": port}), flush=True)
for _ in sys.stdin:
    print(json.dumps({"seen": list(seen)}), flush=True)
