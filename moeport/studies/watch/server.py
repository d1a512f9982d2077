"""The page on a port of this machine: two addresses behind a token, and nothing that a reader could change.

No address names a file: the page and its parts are made from what `Followed` has read, so that no path of a request
reaches the disk.
"""

from __future__ import annotations

import gzip
import hmac
import ipaddress
import json
import re
import secrets
import socket
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

from typing_extensions import override

from moeport.errors import UserError
from moeport.studies.watch.parts import Page

READS = ("GET", "HEAD")
TOKEN_BYTES = 24
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""Of every answer: the page loads nothing from elsewhere, is in no frame, and gives its address to nobody."""
_HAVE = re.compile(r"have=(\d{1,18})")


class WatchServer(ThreadingHTTPServer):
    """Serves one page.

    Args:
        page: the page.
        host: address to listen on.
        port: port to listen on; 0: a free one.

    Raises UserError, which says what to do, if it cannot listen there.
    """

    daemon_threads = True
    allow_reuse_address = False

    def __init__(self, page: Page, host: str = "127.0.0.1", port: int = 0):
        self.page, self.host, self.token = page, host, secrets.token_urlsafe(TOKEN_BYTES)
        try:
            self.address_family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            super().__init__((host, port), _Handler)
        except OSError as error:
            where = f"{host or 'an empty address'}{f', port {port}' if port else ''}"
            way = "choose another --port, leave it out for a free one, or name" if port else "name"
            raise UserError(
                f"cannot listen on {where}: {error.strerror or error}; {way} an address of this machine with --host"
            ) from error

    @property
    def address(self) -> str:
        """What to open in a browser."""
        name = socket.gethostname() if self.is_open else self.host
        return f"http://{f'[{name}]' if ':' in name else name}:{self.server_port}/{self.token}/"

    @property
    def is_open(self) -> bool:
        """Whether it listens on every address of the machine."""
        return self.host in ("0.0.0.0", "::", "")

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches it."""
        return ipaddress.ip_address(str(self.server_address[0])).is_loopback

    def knows(self, host: str) -> bool:
        """Whether a Host header names this machine, and not a name that an attacker lets point here.

        A name can be made to point here; an address cannot. Ports may differ, as behind a tunnel.
        """
        name = re.sub(r":\d*$", "", host).strip("[]").lower()
        if name in ("localhost", self.host.lower(), socket.gethostname().lower()):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    @override
    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):  # a reader that has gone away
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server_version, sys_version = "moeport", ""
    timeout = 10.0
    """Seconds that a connection may be silent."""

    @override
    def parse_request(self) -> bool:
        if not super().parse_request():
            return False
        if self.command in READS:
            return True
        self._refuse(HTTPStatus.METHOD_NOT_ALLOWED, "only GET and HEAD are answered", {"Allow": ", ".join(READS)})
        return False

    def do_GET(self) -> None:
        """Answer a request."""
        server = cast(WatchServer, self.server)
        path, _, query = self.path.partition("?")
        _, token, rest = [*path.split("/", 2), "", ""][:3] if path.startswith("/") else ("", "", "")
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or not server.knows(hosts[0]):
            self._refuse(HTTPStatus.FORBIDDEN, "the request names another host; use the address that was printed")
        elif not hmac.compare_digest(token.encode("latin-1", "replace"), server.token.encode()):
            self._refuse(HTTPStatus.FORBIDDEN, "the address lacks the token that moeport watch has printed")
        elif not rest and not path.endswith("/"):
            self._refuse(HTTPStatus.PERMANENT_REDIRECT, "see the address with / at its end", {"Location": f"/{token}/"})
        elif not rest:
            self._answer(HTTPStatus.OK, "text/html; charset=utf-8", server.page.html())
        elif rest == "state" and (have := _HAVE.fullmatch(query)):
            changes = json.dumps(server.page.changes(int(have[1])), separators=(",", ":"))
            self._answer(HTTPStatus.OK, "application/json", changes)
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "there is nothing here")

    do_HEAD = do_GET

    def _refuse(self, status: HTTPStatus, why: str, headers: dict[str, str] | None = None) -> None:
        self._answer(status, "text/plain; charset=utf-8", f"{status.value}: {why}\n", headers)

    def _answer(self, status: HTTPStatus, kind: str, text: str, headers: dict[str, str] | None = None) -> None:
        data, headers = text.encode(), HEADERS | (headers or {})
        if "gzip" in self.headers.get("Accept-Encoding", ""):
            data, headers = gzip.compress(data, 1), headers | {"Content-Encoding": "gzip"}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    @override
    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not printed: their addresses hold the token."""
