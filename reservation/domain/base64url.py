"""Base64 in the alphabet of URLs, without padding: `base64`'s own takes three calls for it."""

from binascii import a2b_base64, b2a_base64

__all__ = ["decode", "encode", "encoded"]

_TO_URL = bytes.maketrans(b"+/", b"-_")
_FROM_URL = bytes.maketrans(b"-_", b"+/")


def encode(data: bytes) -> str:
    """The text of these bytes."""
    return encoded(data).decode()


def encoded(data: bytes) -> bytes:
    """The same, as ASCII."""
    return b2a_base64(data).translate(_TO_URL, b"=\n")


def decode(text: bytes) -> bytes:
    """The bytes of this text; characters that are none of the alphabet's are passed over.

    Raises:
        ValueError: it is no base64 at all.
    """
    return a2b_base64(text.translate(_FROM_URL) + b"===")
