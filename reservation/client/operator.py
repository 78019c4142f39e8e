"""HTTP client for the operator's endpoints of a running service."""

from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import quote, urlencode

import httpx
import msgspec

from reservation.client.proxies import uses_proxies

__all__ = [
    "OperatorClient",
    "ServiceRefused",
    "ServiceUnreachable",
    "name_header",
    "path_of",
]

#: Time-out of a response; an audit of a large sale reads every reservation of it.
_ANSWER_SECONDS_MAX: Final = 180.0
_CONNECT_SECONDS_MAX: Final = 5.0

#: Maximum length of the error text from a response that is not a problem document.
_DETAIL_CHARS_MAX: Final = 200

_EXTENDED: Final = "UTF-8''"


class ServiceUnreachable(Exception):
    """No answer: whether a change was made is unknown."""


class ServiceRefused(Exception):
    """The service refused the call."""

    def __init__(self, status: int, code: str, detail: str) -> None:
        self.status = status
        self.code = code
        super().__init__(f"{code}: {detail}" if detail else code)


class _Problem(msgspec.Struct):
    code: str
    detail: str = ""


def path_of(*segments: str) -> str:
    """A path of percent-encoded segments."""
    return "/" + "/".join(quote(segment, safe="") for segment in segments)


def name_header(name: str) -> str:
    """The `X-Operator` header of a name: ASCII as it is, all else in the form of RFC 8187."""
    if name.isascii() and not name.lower().startswith(_EXTENDED.lower()):
        return name
    return _EXTENDED + quote(name, safe="")


class OperatorClient:
    """One connection to a service, with the operator's key and name.

    Args:
        url: the service's address.
        admin_api_key: an operator's own key, or the admin API key.
        operator: the name that is recorded with a change by the admin API key, in any language.
            A key of an operator has its own name, which is recorded instead.

    Raises:
        ServiceUnreachable: the address, or a proxy from the environment, is invalid.
    """

    def __init__(self, url: str, admin_api_key: str, *, operator: str) -> None:
        headers = {"Accept": "application/json", "X-Operator": name_header(operator)}
        if admin_api_key:
            headers["Authorization"] = f"Bearer {admin_api_key}"
        self._url = url
        try:
            self._client = httpx.Client(
                base_url=url,
                headers=headers,
                timeout=httpx.Timeout(_ANSWER_SECONDS_MAX, connect=_CONNECT_SECONDS_MAX),
                trust_env=uses_proxies(url),
            )
        except (ValueError, ImportError, httpx.InvalidURL) as error:
            # httpx builds its proxies here, and does not accept every form of them.
            raise ServiceUnreachable(f"{url} is not a usable address: {_why(error)}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._client.close()

    def call(
        self,
        method: str,
        path: str,
        *,
        body: object = None,
        idempotency_key: str | None = None,
    ) -> bytes:
        """The body of a successful response.

        Raises:
            ServiceRefused: any other response.
            ServiceUnreachable: no response.
        """
        headers = {"Idempotency-Key": idempotency_key} if idempotency_key else {}
        try:
            response = self._client.request(
                method, path, headers=headers, json=body if body is not None else None
            )
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ServiceUnreachable(f"{self._url} does not answer: {_why(error)}") from error
        if response.is_success:
            return response.content
        raise _refused(response)

    def release(self, order_id: str, *, reason: str) -> bytes:
        """Release an order; the account of one that awaits its deposit is cancelled first.

        Raises:
            ServiceRefused, ServiceUnreachable: as `call`.
        """
        path = path_of("v1", "admin", "orders", order_id, "release")
        return self.call("POST", path, body={"reason": reason})

    def resolve(self, order_id: str, *, reason: str) -> bytes:
        """Look the payment of an order up now, and settle what the payment provider shows.

        Raises:
            ServiceRefused, ServiceUnreachable: as `call`.
        """
        path = path_of("v1", "admin", "orders", order_id, "resolve")
        return self.call("POST", path, body={"reason": reason})

    def create_key(self, name: str, *, role: str, reason: str = "") -> bytes:
        """Create an operator's key: `key` of the answer, which no other answer has.

        Args:
            name: recorded with each change by the key.
            role: viewer, support, manager or owner.
            reason: why the key is created.

        Raises:
            ServiceRefused, ServiceUnreachable: as `call`.
        """
        body = {"name": name, "role": role, "reason": reason}
        return self.call("POST", path_of("v1", "admin", "keys"), body=body)

    def list_keys(self, *, cursor: str | None = None) -> bytes:
        """A page of operators' keys, newest first.

        Raises:
            ServiceRefused, ServiceUnreachable: as `call`.
        """
        return self.call("GET", _page(path_of("v1", "admin", "keys"), cursor))

    def revoke_key(self, key_id: str, *, reason: str = "") -> bytes:
        """Revoke an operator's key.

        Raises:
            ServiceRefused, ServiceUnreachable: as `call`.
        """
        query = f"?{urlencode({'reason': reason})}" if reason else ""
        return self.call("DELETE", path_of("v1", "admin", "keys", key_id) + query)

    def sale_history(self, sale_id: str, *, cursor: str | None = None) -> bytes:
        """A page of the changes of a sale, newest first.

        Raises:
            ServiceRefused, ServiceUnreachable: as `call`.
        """
        return self.call("GET", _page(path_of("v1", "admin", "sales", sale_id, "history"), cursor))


def _page(path: str, cursor: str | None) -> str:
    return f"{path}?{urlencode({'cursor': cursor})}" if cursor else path


def read(content: bytes) -> Any:
    """The members of a successful response."""
    try:
        return msgspec.json.decode(content)
    except msgspec.DecodeError as error:
        raise ServiceRefused(200, "not_this_service", "the response is not JSON") from error


def _why(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _refused(response: httpx.Response) -> ServiceRefused:
    try:
        problem = msgspec.json.decode(response.content, type=_Problem)
    except msgspec.MsgspecError:
        text = " ".join(response.text.split())[:_DETAIL_CHARS_MAX]
        return ServiceRefused(response.status_code, f"status {response.status_code}", text)
    return ServiceRefused(response.status_code, problem.code, problem.detail)
