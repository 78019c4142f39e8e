"""HMAC-SHA256 with a precomputed key state: half the time of a digest by the key itself."""

import hashlib

__all__ = ["Mac"]

_BLOCK_BYTES = hashlib.sha256().block_size
_INNER = bytes(byte ^ 0x36 for byte in range(256))
_OUTER = bytes(byte ^ 0x5C for byte in range(256))


class Mac:
    """HMAC-SHA256 with one key (RFC 2104)."""

    __slots__ = ("_begin", "_end")

    def __init__(self, key: bytes) -> None:
        if len(key) > _BLOCK_BYTES:
            key = hashlib.sha256(key).digest()
        block = key.ljust(_BLOCK_BYTES, b"\0")
        self._begin = hashlib.sha256(block.translate(_INNER)).copy
        self._end = hashlib.sha256(block.translate(_OUTER)).copy

    def digest(self, message: bytes) -> bytes:
        """The 32-byte authentication code of a message."""
        inner = self._begin()
        inner.update(message)
        outer = self._end()
        outer.update(inner.digest())
        return outer.digest()
