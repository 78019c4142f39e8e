"""Base64 in the alphabet of URLs, without padding: `base64`'s own takes three calls for it."""

from binascii import b2a_base64

__all__ = ["encode"]

_TO_URL = bytes.maketrans(b"+/", b"-_")


def encode(data: bytes) -> str:
    """The text of these bytes."""
    return b2a_base64(data, newline=False).translate(_TO_URL, b"=").decode()
