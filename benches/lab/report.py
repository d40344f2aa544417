"""Figures, ratios and verdicts: Markdown to read, values for JSON."""

TITLES = {
    "h1": "HTTP/1.1, 64 persistent connections, small JSON",
    "h2": "HTTP/2, 8 connections x 16 streams, small JSON",
    "bodies": "HTTP/1.1, 16 connections, bodies of 1 MiB",
}

# Measure, the other proxy, and the maximum ratio of CPU per request: hopguard divided by that proxy.
WANTED_RATIOS = [
    ("h1", "haproxy", 0.85),
    ("h1", "envoy", 0.33),
    ("h1", "nginx", 1.2),
    ("h2", "haproxy", 1.1),
    ("h2", "envoy", 0.65),
    ("bodies", "haproxy", 1.2),
]
WANTED_IDLE_MIB = 10
WANTED_MORE_MIB = 15
WANTED_ROUTES_RATIO = 1.05
WANTED_RELOAD_MS = 200


def verdicts(results):
    """Rows with measured value, target, and whether the target is met. A measure that did not run has no row."""
    rows = []
    for measure, other, wanted in WANTED_RATIOS:
        found = results.get(measure, {})
        if {"hopguard", other} <= found.keys():
            ratio = found["hopguard"]["cpu_us"] / found[other]["cpu_us"]
            rows.append(verdict(f"{measure}: CPU per request, hopguard / {other}", ratio, wanted, ""))
    if own := results.get("memory", {}).get("hopguard"):
        rows.append(verdict("memory: resident, idle", own["idle_mib"], WANTED_IDLE_MIB, " MiB"))
        rows.append(verdict("memory: 1,000 idle connections more", own["more_mib"], WANTED_MORE_MIB, " MiB"))
    if found := results.get("routes"):
        ratio = found["many"]["cpu_us"] / found["few"]["cpu_us"]
        rows.append(verdict("routes: CPU per request, 10,000 routes / 10", ratio, WANTED_ROUTES_RATIO, ""))
        reload = found["reload"]
        took = reload["seen_ms"] if reload["told_ms"] is None else reload["told_ms"]
        rows.append(verdict("routes: reload of 10,000", took, WANTED_RELOAD_MS, " ms"))
    return rows


def verdict(what, found, wanted, unit):
    return {"what": what, "found": round(found, 3), "wanted": wanted, "unit": unit, "holds": found <= wanted}


def markdown(machine, versions, notes, results, faults):
    parts = ["# hopguard compared with other proxies", machine_line(machine), bullets(versions, notes)]
    for measure, title in TITLES.items():
        if measure in results:
            parts += [f"## {title}", load_table(results[measure])]
    if "memory" in results:
        parts += ["## Resident memory, MiB", memory_table(results["memory"])]
    if "routes" in results:
        parts += ["## 10 and 10,000 routes", load_table({"10 routes": results["routes"]["few"], "10,000 routes": results["routes"]["many"]})]
        parts.append(reload_line(results["routes"]["reload"]))
    if rows := verdicts(results):
        parts += ["## Measured values and targets", verdict_table(rows), *floor_line(results.get("h1", {}))]
    if faults:
        parts += ["## Faults", "\n".join(f"- {fault}" for fault in faults)]
    return "\n\n".join(parts) + "\n"


def machine_line(machine):
    line = (
        f"{machine['date']}; {machine['cpu']}, {machine['cores']} cores, Linux {machine['kernel']}; the proxy alone on core {machine['proxy_core']}, "
        f"load and upstream on the others; medians of {machine['rounds']} rounds of {machine['seconds']} s."
    )
    if machine["load_before"] > 0.5:
        line += f" **The machine was busy before the run (load {machine['load_before']:.1f}).**"
    return line


def bullets(versions, notes):
    return "\n".join([f"- {name}: {version}" for name, version in versions.items()] + [f"- {note}" for note in notes])


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def load_table(found):
    """The other rows are compared with the first one: hopguard, if it was measured."""
    first = next(iter(found))
    head = ["", "CPU/request", f"{first} / this", "requests/s", "p50", "p99", "core used", "RSS"]
    rows = []
    for name, row in found.items():
        ratio = "" if name == first else f"{found[first]['cpu_us'] / row['cpu_us']:.2f}"
        cells = [f"{row['cpu_us']:.1f} us", ratio, f"{row['per_second']:,.0f}", milliseconds(row["p50_us"]), milliseconds(row["p99_us"])]
        rows.append([name, *cells, f"{row['busy']:.0%}", f"{row['resident_mib']:.1f} MiB"])
    return table(head, rows)


def milliseconds(micros):
    return f"{micros / 1000:.2f} ms"


def memory_table(found):
    head = ["", "idle", "1,000 idle connections", "difference", "3 s after they closed"]
    keys = ("idle_mib", "held_mib", "more_mib", "closed_mib")
    return table(head, [[name] + [f"{row[key]:.1f}" for key in keys] for name, row in found.items()])


def reload_line(reload):
    told = "" if reload["told_ms"] is None else f" By its own metric the reload took {reload['told_ms']:.0f} ms."
    return f"A changed policy of 10,000 routes was in force {reload['seen_ms']:.0f} ms after the file was renamed.{told}"


def floor_line(found):
    """The ratios that HAProxy in tcp mode, which parses nothing, would reach for HTTP/1.1: a lower bound."""
    if "haproxy-tcp" not in found:
        return []
    floor = found["haproxy-tcp"]["cpu_us"]
    ratios = [f"{floor / found[other]['cpu_us']:.2f} x {other}" for measure, other, _ in WANTED_RATIOS if measure == "h1" and other in found]
    return [f"For comparison, HAProxy in mode tcp, which only copies bytes, needs {floor:.1f} us per HTTP/1.1 call: {', '.join(ratios)}."]


def verdict_table(rows):
    marks = {True: "✓ met", False: "✗ **not met**"}
    return table(
        ["", "measured", "target", ""],
        [[row["what"], f"{row['found']:.3g}{row['unit']}", f"<= {row['wanted']}{row['unit']}", marks[row["holds"]]] for row in rows],
    )
