"""Proxies in front of the service as operators run them: nginx, HAProxy and Caddy."""

import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.support.programs import end, find
from tests.support.service import free_port

__all__ = ["OF_THE_PAGE", "PROXIES", "WITH_A_CACHE", "nginx_of_the_page", "proxied"]

PAGE = Path(__file__).resolve().parents[3] / "docs/how-to/going-live.md"
#: The proxy whose lines operators copy. It keeps the operators' paths from the world.
OF_THE_PAGE = "nginx of the page"
CACHE_PAGE = PAGE.with_name("cdn.md")
#: The same, with the cache of docs/how-to/cdn.md.
WITH_A_CACHE = "nginx with a cache"

START_SECONDS = 30.0
STOP_SECONDS = 10.0

_NGINX = """
{user}
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/nginx.err;
worker_processes 1;
worker_rlimit_nofile 16384;
events {{ worker_connections 8192; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
{servers}
}}
"""
_NGINX_SERVER = """
  map $http_upgrade $connection_upgrade {{ default upgrade; '' ''; }}
  upstream service {{ server {backend}; keepalive 8; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://service;
{lines}
    }}
  }}
"""
#: The differences from the going-live page: its two servers, and its port.
_PAGE_SERVERS = "".join(f"  server 10.0.0.{n}:8000 max_fails=0;\n" for n in (11, 12))
_PAGE_LISTEN = "listen 443 ssl;"
_PAGE_LOCATION = "  location / {"
_PAGE_CACHE = "/var/cache/nginx/reservation"
_NGINX_BLOCK = re.compile(r"^```nginx\n(.*?)^```", re.MULTILINE | re.DOTALL)
_WEBSOCKET_LINES = """
      proxy_http_version 1.1;
      proxy_set_header Upgrade $http_upgrade;
      proxy_set_header Connection $connection_upgrade;
"""
_HAPROXY = """
global
  maxconn 500
defaults
  mode http
  timeout connect 5s
  timeout client 30s
  timeout server 30s
  option forwardfor
frontend f
  bind 127.0.0.1:{port}
  default_backend b
backend b
  http-reuse always
  server s1 {backend}
"""
_CADDY = """
{{
  admin off
  auto_https off
  storage file_system {folder}/caddy
}}
http://:{port} {{
  bind 127.0.0.1
  reverse_proxy {backend}
}}
"""


def _nginx(folder: Path, backend: str, port: int, lines: str) -> list[str]:
    return _nginx_with(folder, _NGINX_SERVER.format(backend=backend, port=port, lines=lines))


def _nginx_with(folder: Path, servers: str) -> list[str]:
    config = folder / "nginx.conf"
    # Its workers write large bodies into the folder, which is the test's own.
    user = "user root;" if os.geteuid() == 0 else ""
    config.write_text(_NGINX.format(user=user, folder=folder, servers=servers))
    return [str(find("nginx")), "-e", f"{folder}/start.err", "-c", str(config)]


def nginx_of_the_page(
    folder: Path, backends: Sequence[str], port: int, *, host: str = "127.0.0.1"
) -> list[str]:
    """Nginx by the block of docs/how-to/going-live.md, without TLS and at these addresses."""
    return _nginx_with(folder, _block_of_the_page(backends, port, host))


def _block_of_the_page(backends: Sequence[str], port: int, host: str = "127.0.0.1") -> str:
    (block,) = _NGINX_BLOCK.findall(PAGE.read_text())
    servers = "".join(f"  server {backend} max_fails=0;\n" for backend in backends)
    for theirs, ours in ((_PAGE_SERVERS, servers), (_PAGE_LISTEN, f"listen {host}:{port};")):
        assert block.count(theirs) == 1, theirs
        block = block.replace(theirs, ours)
    return block


def _nginx_with_a_cache(folder: Path, backend: str, port: int) -> list[str]:
    of_http, of_server = _NGINX_BLOCK.findall(CACHE_PAGE.read_text())
    assert of_http.count(_PAGE_CACHE) == 1
    block = _block_of_the_page([backend], port)
    assert block.count(_PAGE_LOCATION) == 1
    block = block.replace(_PAGE_LOCATION, f"{of_server}\n{_PAGE_LOCATION}")
    return _nginx_with(folder, of_http.replace(_PAGE_CACHE, f"{folder}/cache") + block)


def _nginx_of_the_page(folder: Path, backend: str, port: int) -> list[str]:
    return nginx_of_the_page(folder, [backend], port)


def _nginx_plain(folder: Path, backend: str, port: int) -> list[str]:
    return _nginx(folder, backend, port, "")


def _nginx_websocket(folder: Path, backend: str, port: int) -> list[str]:
    return _nginx(folder, backend, port, _WEBSOCKET_LINES)


def _nginx_unbuffered(folder: Path, backend: str, port: int) -> list[str]:
    lines = _WEBSOCKET_LINES + "      proxy_request_buffering off;\n      proxy_buffering off;\n"
    return _nginx(folder, backend, port, lines)


def _haproxy(folder: Path, backend: str, port: int) -> list[str]:
    config = folder / "haproxy.cfg"
    config.write_text(_HAPROXY.format(backend=backend, port=port))
    return [str(find("haproxy")), "-f", str(config)]


def _caddy(folder: Path, backend: str, port: int) -> list[str]:
    config = folder / "Caddyfile"
    config.write_text(_CADDY.format(folder=folder, backend=backend, port=port))
    return [str(find("caddy")), "run", "--adapter", "caddyfile", "--config", str(config)]


PROXIES: dict[str, Callable[[Path, str, int], list[str]]] = {
    "nginx with websocket lines": _nginx_websocket,
    "nginx with websocket lines, unbuffered": _nginx_unbuffered,
    "nginx as it comes": _nginx_plain,
    OF_THE_PAGE: _nginx_of_the_page,
    "HAProxy": _haproxy,
    "Caddy": _caddy,
}


@contextmanager
def proxied(name: str, url: str, folder: Path) -> Iterator[str]:
    """The address of this proxy in front of a service; ended by its own pid."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    start = _nginx_with_a_cache if name == WITH_A_CACHE else PROXIES[name]
    command = start(folder, url.removeprefix("http://"), port)
    with (folder / "proxy.log").open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=folder)
    try:
        address = f"http://127.0.0.1:{port}"
        _wait_for(process, address, folder)
        yield address
    finally:
        end(process, within=STOP_SECONDS)


def _wait_for(process: "subprocess.Popen[bytes]", address: str, folder: Path) -> None:
    give_up_at = time.monotonic() + START_SECONDS
    while time.monotonic() < give_up_at and process.poll() is None:
        try:
            if httpx.get(f"{address}/health/live", trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.05)
    raise AssertionError((folder / "proxy.log").read_text())
