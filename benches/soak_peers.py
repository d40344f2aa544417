#!/usr/bin/env python3
"""Restarts real upstreams under mixed load, directly and through hopguard side by side. `docs/servers.md` describes the result.

Each upstream has its share of the time. Python of target/peers/venv; `scripts/peers-servers` installs it and the upstreams. Exit code: 0 if no more
calls fail through hopguard than directly and no circuit breaker opens while fresh connections are answered, 1 if not, 2 a program is missing.
"""

import argparse
import asyncio
import contextlib
import os
import shutil
import signal
import sys
import time

from lab.processes import free_ports
from soak import load, servers, sidecar, verdict

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FIRST_RESTART = 4


def main():
    options = command_line()
    os.chdir(ROOT)
    os.makedirs(options.out, exist_ok=True)
    chosen = [kind for kind in servers.kinds("FOLDER") if kind.name in options.only]
    if missing := servers.missing(chosen) + ([] if os.path.exists(options.binary) else [options.binary]):
        print("missing:", *missing, file=sys.stderr)
        return 2
    results = asyncio.run(run(options))
    text = verdict.markdown(results)
    print(text)
    with open(os.path.join(options.out, "results.md"), "w", encoding="utf-8") as file:
        file.write(text)
    return 1 if any(result.faults() for result in results) else 0


def command_line():
    names = [kind.name for kind in servers.kinds("")]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="of load, over all upstreams (10)")
    parser.add_argument("--only", type=lambda text: text.split(","), default=servers.DEFAULT, metavar="LIST", help="of " + ",".join(names))
    parser.add_argument("--seed", type=int, default=1, help="of the moments of the calls (1)")
    parser.add_argument("--binary", type=os.path.abspath, default=os.path.join(ROOT, "target/release/hopguard"), help="the hopguard to measure")
    parser.add_argument("--out", type=os.path.abspath, default=os.path.join(ROOT, "target/soak"), help="folder for results.md and logs")
    options = parser.parse_args()
    if unknown := [name for name in options.only if name not in names]:
        parser.error(f"{unknown[0]!r} is none of {', '.join(names)}")
    return options


async def run(options):
    # A signal leaves the `finally` blocks normally, and they end the started processes.
    for sign in (signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(sign, asyncio.current_task().cancel)
    results = []
    seconds = options.minutes * 60 / len(options.only)
    for name in options.only:
        folder = os.path.join(options.out, name)
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder)
        kind = next(kind for kind in servers.kinds(folder) if kind.name == name)
        begun = time.monotonic()
        results.append(await upstream(kind, folder, seconds, options))
        faults = results[-1].faults()
        print(f"{name}: {time.monotonic() - begun:.0f} s, {len(faults)} faults", *faults, sep="\n  ", file=sys.stderr, flush=True)
    return results


async def upstream(kind, folder, seconds, options):
    port, *ports = free_ports(4)
    server, proxy = servers.Server(kind, port, folder), sidecar.Sidecar(options.binary, folder, port, ports)
    try:
        await server.start()
        await server.ready()
        await proxy.start()
        targets = {"direct": port} | {side: proxy.ports[side] for side in sidecar.SIDES}
        loads = [load.Load(kind, target, at, options.seed) for target, at in targets.items()]
        begin = time.monotonic() + 0.2
        async with background(proxy.watch()), background(server.watch()), background(restarts(server, begin, begin + seconds)):
            async with asyncio.TaskGroup() as group:
                for one in loads:
                    group.create_task(one.run(begin, begin + seconds))
        return verdict.Result(server, kind.version(), loads, proxy)
    finally:
        await proxy.stop()
        await server.stop()


@contextlib.asynccontextmanager
async def background(work):
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def restarts(server, begin, end):
    """Restarts the server again and again, each way in its turn; the last time early enough for its end to be seen."""
    ways, count = server.kind.ways(), 0
    due = begin + FIRST_RESTART
    while due < end - server.kind.every / 2:
        await asyncio.sleep(max(0, due - time.monotonic()))
        await server.restart(ways[count % len(ways)])
        server.end_old()
        count += 1
        due = max(due + server.kind.every, time.monotonic())


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
