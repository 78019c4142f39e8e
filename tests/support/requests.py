"""Requests without a server, for code that reads a request."""

from typing import Final

from litestar import Litestar
from litestar.testing import RequestFactory

__all__ = ["REQUESTS"]

# The default application would send every later log line of this process to a stream of one test.
REQUESTS: Final = RequestFactory(Litestar([], openapi_config=None, logging_config=None))
