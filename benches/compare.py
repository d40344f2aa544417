#!/usr/bin/env python3
"""Compares hopguard with nginx, HAProxy and Envoy in one run on this machine. `docs/benchmarks.md` describes the result.

Python's standard library only. Needs nginx (the upstream), wrk and h2load; a proxy that is not installed is left out, and the output has its
install command. Exit code: 0 measured, 1 a measure failed or a response was not 200, 2 invalid command line, or a tool is missing.
"""

import argparse
import datetime
import json
import os
import shutil
import signal
import sys
import tempfile

from lab import loads, measures, report, subjects

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MEASURES = {"h1": measures.http1, "h2": measures.http2, "bodies": measures.bodies, "memory": measures.memory, "routes": measures.routes}
SUBJECTS = ["hopguard", "haproxy", "haproxy-tcp", "nginx", "envoy"]


def main():
    options = command_line()
    os.chdir(ROOT)
    # A signal leaves the `with` blocks normally, and they end the started processes.
    for sign in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(sign, lambda number, _: sys.exit(128 + number))
    chosen, notes = installed(options)
    missing = loads.missing_tools() | ({} if shutil.which("nginx") else {"nginx": subjects.Nginx.install})
    if missing or not chosen:
        print(*(f"{tool} is missing: {install}" for tool, install in missing.items()), *notes, sep="\n", file=sys.stderr)
        return 2
    machine = measures.machine() | {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
        "rounds": options.rounds,
        "seconds": options.seconds,
    }
    measures.allow_many_files()
    results, faults = run(options, chosen)
    versions = {subject.name: subject.version() for subject in chosen}
    notes += [subject.note for subject in chosen if subject.note and "h2" in results]
    text = report.markdown(machine, versions, notes, results, faults)
    print(text)
    save(options.out, text, machine, versions, results, faults)
    return 1 if faults else 0


def command_line():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=choices_of(MEASURES), default=list(MEASURES), metavar="LIST", help="of " + ",".join(MEASURES))
    parser.add_argument("--subjects", type=choices_of(SUBJECTS), default=SUBJECTS, metavar="LIST", help="of " + ",".join(SUBJECTS))
    parser.add_argument("--rounds", type=positive, default=5, help="rounds of load per measure and proxy (5)")
    parser.add_argument("--seconds", type=positive, default=4, help="duration of a round (4)")
    parser.add_argument("--binary", type=os.path.abspath, default=os.path.join(ROOT, "target/pgo/hopguard"), help="the hopguard to measure")
    parser.add_argument("--out", type=os.path.abspath, default=os.path.join(ROOT, "target/bench"), help="folder for results.json and results.md")
    return parser.parse_args()


def choices_of(allowed):
    def parse(text):
        chosen = text.split(",")
        unknown = [name for name in chosen if name not in allowed]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(allowed)}")
        return chosen

    return parse


def positive(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def installed(options):
    """The chosen proxies that are installed, and a note for each that is not."""
    every = [subjects.Hopguard(options.binary), subjects.Haproxy(), subjects.HaproxyTcp(), subjects.Nginx(), subjects.Envoy()]
    wanted = [subject for subject in every if subject.name in options.subjects]
    notes = [f"not measured, not installed: {subject.name} ({subject.install})" for subject in wanted if not subject.program()]
    return [subject for subject in wanted if subject.program()], notes


def run(options, chosen):
    results, faults = {}, []
    with tempfile.TemporaryDirectory(prefix="hopguard-bench-") as folder, subjects.start_upstream(folder) as upstream:
        lab = measures.Lab(folder, upstream, options.rounds, options.seconds, lambda text: print(text, file=sys.stderr, flush=True))
        for name in options.only:
            measured = [subject for subject in chosen if name in getattr(subject, "measures", MEASURES)]
            if name == "routes":
                measured = next((subject for subject in measured if subject.name == "hopguard"), None)
            if not measured:
                continue
            try:
                results[name] = MEASURES[name](lab, measured)
            except (RuntimeError, OSError) as error:
                faults.append(f"{name}: not measured: {error}")
        return results, lab.faults + faults


def save(folder, text, machine, versions, results, faults):
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "results.md"), "w", encoding="utf-8") as file:
        file.write(text)
    everything = {"machine": machine, "versions": versions, "results": results, "verdicts": report.verdicts(results), "faults": faults}
    with open(os.path.join(folder, "results.json"), "w", encoding="utf-8") as file:
        json.dump(everything, file, indent=1)
    shown = os.path.relpath(folder)
    print(f"written to {shown}/results.md and {shown}/results.json", file=sys.stderr)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
