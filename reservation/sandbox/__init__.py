"""A stand-in for the PG: its HTTP, its states and its money, in its own process."""

from reservation.sandbox.app import create_sandbox
from reservation.sandbox.config import SandboxConfig

__all__ = ["SandboxConfig", "create_sandbox"]
