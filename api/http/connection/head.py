"""Parses the head of an HTTP/1.x request strictly by RFC 9112, and refuses any other input.

One function, `read_head`, turns the bytes before the empty line into a `Head`: method, target,
header fields and body length. An upgrade offer is an ordinary header field here. It cannot end the
request, so a body always belongs to the request in front of it.
"""

import re
from typing import Final, NoReturn

import msgspec

__all__ = [
    "BODY_BYTES_MAX",
    "CHUNKED",
    "HEADERS_MAX",
    "HEAD_BYTES_MAX",
    "HEAD_ENDS",
    "Head",
    "RequestRefused",
    "check_start",
    "read_head",
    "refuse_body",
]

#: The end of the last header line, and the empty line.
HEAD_ENDS: Final = b"\r\n\r\n"
#: Proxies allow 8 to 32 KiB, so no request that comes through one is larger.
HEAD_BYTES_MAX: Final = 32 * 1024
#: Browsers send about 20 header fields, proxies add about 10.
HEADERS_MAX: Final = 100
#: Of any route; most routes have their own smaller limit.
BODY_BYTES_MAX: Final = 256 * 1024
#: The length of a chunked body is known only at its end.
CHUNKED: Final = -1

_METHODS: Final = frozenset(
    (b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"PATCH", b"OPTIONS", b"TRACE")
)
#: HTAB, SP, VCHAR and obs-text (RFC 9110, 5.5); CR and LF appear only in line ends.
_TEXT: Final = bytes([0x09, *range(0x20, 0x7F), *range(0x80, 0x100)])
_LINE_ENDS: Final = [b"\r\n" * count for count in range(HEADERS_MAX + 1)]
#: In a partial head: a control character, or an incomplete line end.
_NOT_TEXT = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|(?<!\r)\n|\r(?!\n|\Z)")
_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VERSION = re.compile(rb"HTTP/[0-9]\.[0-9]")
_ABSOLUTE = re.compile(rb"(?i:https?)://[^/?#]+")
_HOST = re.compile(rb"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~!$&'()*+,;=%-]*)(?::[0-9]{0,5})?")
_DIGITS_MAX: Final = 19

_COMMON_NAMES: Final = (
    "Accept",
    "Accept-Encoding",
    "Accept-Language",
    "Authorization",
    "Connection",
    "Content-Length",
    "Content-Type",
    "Cookie",
    "Host",
    "Idempotency-Key",
    "Origin",
    "Referer",
    "User-Agent",
    "X-Forwarded-For",
    "X-Forwarded-Proto",
    "X-Real-IP",
    "X-Request-Id",
    "X-Sale-Admission",
)
#: From the spelling on the wire to the name in lower case. Most requests use the same names.
_names: dict[bytes, bytes] = {
    spelling: name.lower().encode()
    for name in _COMMON_NAMES
    for spelling in (name.encode(), name.lower().encode())
}
#: Cache of parsed header lines, for those that many requests have in common.
_lines: dict[bytes, tuple[bytes, bytes]] = {}
_BATCHED_LINES: Final = frozenset(
    (
        b"accept",
        b"accept-encoding",
        b"accept-language",
        b"connection",
        b"content-length",
        b"content-type",
        b"host",
        b"origin",
        b"user-agent",
        b"x-forwarded-proto",
    )
)
_CACHED_LINE_BYTES_MAX: Final = 256
#: Cache of validated Host values.
_hosts: set[bytes | None] = set()
_CACHED_MAX: Final = 1_000


class RequestRefused(Exception):
    """The bytes are not a request that this server accepts."""

    def __init__(self, status: int, code: str, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = detail


class Head(msgspec.Struct):
    """A request without its body."""

    method: bytes
    #: Path and query as sent, without scheme, authority and fragment.
    target: bytes
    #: The minor version: 0 or 1.
    minor: int
    #: Names in lower case.
    headers: list[tuple[bytes, bytes]]
    #: The last value of each name.
    fields: dict[bytes, bytes]
    #: Of the body, in bytes, or `CHUNKED`.
    length: int
    keep_alive: bool

    @property
    def expects_continue(self) -> bool:
        """Whether the client waits for `100 Continue` before it sends the body."""
        return self.minor == 1 and self.fields.get(b"expect", b"").lower() == b"100-continue"


def check_start(received: bytes, checked: int) -> None:
    """Refuse a partial head as soon as it is invalid.

    Args:
        received: all bytes of the head so far.
        checked: the number of them that an earlier call checked.

    Raises:
        RequestRefused: it is too large, or is not the beginning of a valid head.
    """
    if _NOT_TEXT.search(received, max(0, checked - 1)) is not None:
        _refuse_head()
    # All of HEAD_ENDS but its last byte may have arrived.
    if len(received) >= HEAD_BYTES_MAX + len(HEAD_ENDS):
        _refuse_size()


def read_head(head: bytes) -> Head:
    """Parse the head of a request.

    Args:
        head: everything before `HEAD_ENDS`.

    Raises:
        RequestRefused: with the status that RFC 9110 has for it.
    """
    lines = head.split(b"\r\n")
    count = len(lines) - 1
    if count > HEADERS_MAX or len(head) > HEAD_BYTES_MAX:
        _refuse_size()
    if head.translate(None, _TEXT) != _LINE_ENDS[count]:
        _refuse_head()
    try:
        method, target, version = lines[0].split(b" ")
    except ValueError:
        _refuse("The request line must be `METHOD target HTTP/1.1`.")
    if version != b"HTTP/1.1" or method not in _METHODS:
        _check_request_line(method, version)
    minor = 1 if version == b"HTTP/1.1" else 0
    if target[:1] != b"/" or not target.isascii() or b"#" in target or b"\t" in target:
        target = _origin_form(target, method)
    del lines[0]
    headers: list[tuple[bytes, bytes]] = []
    try:
        for line in lines:
            header = _lines.get(line)
            if header is None:
                name, value = line.split(b":", 1)
                header = _names[name], value.strip()
                if header[0] in _BATCHED_LINES:
                    _remember(line, header)
            headers.append(header)
    except (KeyError, ValueError):
        headers = [_header(line) for line in lines]
    fields = dict(headers)
    if len(fields) != len(headers):
        _check_repeated(headers)
    if fields.get(b"host") not in _hosts:
        _check_host(fields.get(b"host"), minor)
    return Head(
        method,
        target,
        minor,
        headers,
        fields,
        _length(fields, minor),
        minor == 1 and (b"connection" not in fields or not _closes(headers)),
    )


def _refuse(detail: str) -> NoReturn:
    raise RequestRefused(400, "malformed_request", detail)


def _refuse_head() -> NoReturn:
    _refuse("The request head has a control character or a line that does not end in CR LF.")


def _refuse_size() -> NoReturn:
    raise RequestRefused(
        431,
        "head_too_large",
        f"The request head exceeds {HEAD_BYTES_MAX} bytes or {HEADERS_MAX} header lines.",
    )


def _check_request_line(method: bytes, version: bytes) -> None:
    if _TOKEN.fullmatch(method) is None or _VERSION.fullmatch(version) is None:
        _refuse("The request line must be `METHOD target HTTP/1.1`.")
    if version not in (b"HTTP/1.0", b"HTTP/1.1"):
        raise RequestRefused(
            505, "http_version_not_supported", "Only HTTP/1.1 and HTTP/1.0 are supported."
        )
    if method not in _METHODS:
        raise RequestRefused(501, "not_implemented", "The method is not supported.")


def _origin_form(target: bytes, method: bytes) -> bytes:
    """Path and query of a target in another form (RFC 9112, 3.2)."""
    if not target.isascii() or b"\t" in target:
        _refuse("The target has a character that a URI must not contain.")
    if target == b"*" and method == b"OPTIONS":
        return target
    absolute = _ABSOLUTE.match(target)
    if absolute is not None:
        target = target[absolute.end() :]
        if target[:1] != b"/":
            target = b"/" + target
    if target[:1] != b"/":
        _refuse("The target must be a path or an http URI.")
    # A fragment is not part of a request. Proxies remove it too.
    return target.partition(b"#")[0]


def _remember(line: bytes, header: tuple[bytes, bytes]) -> None:
    if len(_lines) >= _CACHED_MAX:
        _lines.clear()
    if len(line) <= _CACHED_LINE_BYTES_MAX:
        _lines[line] = header


def _header(line: bytes) -> tuple[bytes, bytes]:
    name, colon, value = line.partition(b":")
    # This refuses a folded line and a space before the colon too: neither is a token.
    if not colon or _TOKEN.fullmatch(name) is None:
        _refuse("A header line must be `name: value`.")
    lowered = _names.get(name)
    if lowered is None:
        lowered = name.lower()
        if len(_names) < _CACHED_MAX:
            _names[name] = lowered
    return lowered, value.strip()


def _check_repeated(headers: list[tuple[bytes, bytes]]) -> None:
    names = [name for name, _ in headers]
    for single in (b"host", b"content-length", b"transfer-encoding"):
        if names.count(single) > 1:
            _refuse(f"The header {single.decode()} is repeated.")


def _check_host(host: bytes | None, minor: int) -> None:
    if host is None:
        if minor == 1:
            _refuse("The header host is missing.")
    elif _HOST.fullmatch(host) is None:
        _refuse("The header host is invalid.")
    elif len(_hosts) < _CACHED_MAX:
        _hosts.add(host)


def _length(fields: dict[bytes, bytes], minor: int) -> int:
    """The length of the body (RFC 9112, 6.3)."""
    declared = fields.get(b"content-length")
    if b"transfer-encoding" in fields:
        return _of_transfer_coding(fields[b"transfer-encoding"].lower(), minor, declared)
    if declared is None:
        return 0
    if not declared.isdigit() or len(declared) > _DIGITS_MAX:
        _refuse("The header content-length is not a number.")
    length = int(declared)
    if length > BODY_BYTES_MAX:
        refuse_body()
    return length


def _of_transfer_coding(codings: bytes, minor: int, declared: bytes | None) -> int:
    if minor == 0 or declared is not None:
        _refuse("The header transfer-encoding contradicts the version or content-length.")
    if codings == b"chunked":
        return CHUNKED
    names = [name.strip() for name in codings.split(b",")]
    if names[-1] == b"chunked" and names.count(b"chunked") == 1:
        raise RequestRefused(
            501, "not_implemented", "The only supported transfer coding is chunked."
        )
    _refuse("The last transfer coding must be chunked.")


def refuse_body() -> NoReturn:
    """Refuse a body that is too large."""
    raise RequestRefused(
        413, "malformed_request", f"The body is larger than {BODY_BYTES_MAX} bytes."
    )


def _closes(headers: list[tuple[bytes, bytes]]) -> bool:
    """Whether any Connection header says `close`."""
    for name, value in headers:
        if name == b"connection" and b"close" in [
            option.strip() for option in value.lower().split(b",")
        ]:
            return True
    return False
