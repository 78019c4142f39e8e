"""Unpadded base64url; the standard library needs three calls for it."""

from binascii import a2b_base64, b2a_base64

__all__ = ["decode", "encode", "encoded"]

_TO_URL = bytes.maketrans(b"+/", b"-_")
_FROM_URL = bytes.maketrans(b"-_", b"+/")


def encode(data: bytes) -> str:
    """Encode bytes as text."""
    return encoded(data).decode()


def encoded(data: bytes) -> bytes:
    """Encode bytes as ASCII bytes."""
    return b2a_base64(data).translate(_TO_URL, b"=\n")


def decode(text: bytes) -> bytes:
    """Decode text; characters outside the alphabet are skipped.

    Raises:
        ValueError: it is not base64.
    """
    return a2b_base64(text.translate(_FROM_URL) + b"===")
