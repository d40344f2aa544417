#!/usr/bin/env python3
"""Counts the instructions that hopguard executes for a request, under valgrind's callgrind. `docs/benchmarks.md` says how to read the result.

Python's standard library only. Needs valgrind, h2load and nginx (the upstream). Exit code: 0 measured, 1 a count or an answer is missing or a
ratio is above --max-ratio, 2 wrong command line, or a tool or a binary is missing.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from statistics import median, quantiles

from lab import loads, report, subjects
from lab.measures import ORDER

TOOLS = {
    "valgrind": "apt-get install valgrind",
    "callgrind_control": "apt-get install valgrind",
    "h2load": "apt-get install nghttp2-client",
    "nginx": subjects.Nginx.install,
}
# Listener, and what h2load is told. Fewer than the 32 streams from which a worker batches wake-ups: the length of that sleep is time, not work.
PROTOCOLS = {"HTTP/1.1": ("h1", ("--h1", "-c4")), "HTTP/2": ("h2", ("-c4", "-m4"))}
# Requests of the two loads that are subtracted, and how often that is done with one start of the binary.
FEW, MANY = 500, 3000
COUNTS = 2


def main():
    options = command_line()
    if missing := what_is_missing(options.binaries):
        print(*missing, sep="\n", file=sys.stderr)
        return 2
    # However the run is ended, it leaves its `with` blocks, and they end what was started.
    for sign in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(sign, lambda number, _: sys.exit(128 + number))
    try:
        counts = measured(options)
    except (RuntimeError, OSError) as error:
        print(f"not measured: {error}", file=sys.stderr)
        return 1
    rows = [summary(own, counts[0]) for own in counts]
    print(markdown(options, rows))
    faults = too_many(options, rows)
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


def command_line():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binaries", nargs="*", default=["target/release/hopguard"], help="builds of hopguard (target/release/hopguard)")
    parser.add_argument("--rounds", type=at_least_two, default=7, help="how often each binary is started (7)")
    parser.add_argument("--max-ratio", type=float, metavar="RATIO", help="exit with 1 when a binary needs more than RATIO times the first")
    return parser.parse_args()


def at_least_two(text):
    number = int(text)
    if number < 2:
        raise argparse.ArgumentTypeError("must be at least 2: one start cannot show how much the next one differs")
    return number


def what_is_missing(binaries):
    """A line for each tool and each binary that is not there, with what to do."""
    lines = [f"{tool} is missing: {install}" for tool, install in TOOLS.items() if not shutil.which(tool)]
    return lines + [f"{binary} is missing: make build" for binary in binaries if not shutil.which(binary)]


def measured(options):
    """For each binary and protocol every count. The binaries take turns, and each round begins with another one, so that a busy moment of
    the machine meets all of them. Each round starts them anew, because a process draws the seeds of its hash tables once."""
    counts = [{title: [] for title in PROTOCOLS} for _ in options.binaries]
    with tempfile.TemporaryDirectory(prefix="hopguard-instructions-") as folder, subjects.start_upstream(folder) as upstream:
        for number in range(options.rounds):
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
            turn, pairs = number % len(counts), list(zip(options.binaries, counts))
            for binary, own in pairs[turn:] + pairs[:turn]:
                add_start(own, binary, folder, upstream)
    return counts


def add_start(counts, binary, folder, upstream):
    """Starts the binary under callgrind and adds what each protocol takes to `counts`."""
    prefix = f"--vgdb-prefix={folder}/vgdb"
    callgrind = ["valgrind", "--tool=callgrind", prefix, f"--callgrind-out-file={folder}/callgrind.out"]
    with subjects.Hopguard(binary, callgrind).start(folder, upstream) as running:
        read = ["callgrind_control", prefix, "-e", "Ir", str(running.daemon.process.pid)]
        for title, (listener, flags) in PROTOCOLS.items():
            port = getattr(running, listener)
            # Opens the connections to the upstream and fills the pools; not counted.
            loads.h2load_exactly(FEW, port, ORDER, *flags)
            counts[title] += [per_request(read, port, flags) for _ in range(COUNTS)]


def per_request(read, port, flags):
    """The larger load without the smaller one: what is done once for a load is in both."""
    few, many = (cost_of_load(read, port, flags, requests) for requests in (FEW, MANY))
    return (many - few) / (MANY - FEW)


def cost_of_load(read, port, flags, requests):
    before = instructions(read)
    loads.h2load_exactly(requests, port, ORDER, *flags)
    return instructions(read) - before


def instructions(read):
    """What all threads of the process have executed since it started; callgrind_control has a line for each."""
    done = subprocess.run(read, capture_output=True, text=True, check=False)
    threads = re.findall(r"^ *Th \d+ +([\d,]+)", done.stdout, re.MULTILINE)
    if not threads:
        raise RuntimeError(f"callgrind_control shows no count: {(done.stdout + done.stderr)[-1000:]}")
    return sum(int(count.replace(",", "")) for count in threads)


def summary(own, first):
    """For each protocol: the median of the counts, how far they lie apart, and the ratio to the first binary. A count is a difference, which
    can come out too small as well as too large, so the least one is no better than the others."""
    found = {}
    for title, counts in own.items():
        middle, (low, _, high) = median(counts), quantiles(counts, n=4)
        half, spread = (high - low) / middle, (max(counts) - min(counts)) / middle
        found[title] = {"median": middle, "half": half, "spread": spread, "ratio": middle / median(first[title])}
    return found


def markdown(options, rows):
    head = ["instructions per request"] + [cell for title in PROTOCOLS for cell in (title, "middle half", "spread", "ratio")]
    cells = [[binary] + [cell for found in row.values() for cell in shown(found)] for binary, row in zip(options.binaries, rows)]
    return report.table(head, cells)


def shown(found):
    return f"{found['median']:,.0f}", f"{found['half']:.2%}", f"{found['spread']:.2%}", f"{found['ratio']:.4f}"


def too_many(options, rows):
    """A line for each ratio above the one that is allowed."""
    if options.max_ratio is None:
        return []
    return [
        f"{binary} needs {found['ratio']:.4f} times the instructions of {options.binaries[0]} for {title}; allowed is {options.max_ratio}"
        for binary, row in zip(options.binaries[1:], rows[1:])
        for title, found in row.items()
        if found["ratio"] > options.max_ratio
    ]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
