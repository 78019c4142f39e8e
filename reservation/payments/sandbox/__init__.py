"""A stand-in for the PG: its HTTP, its states and its money, in a process of its own."""

from reservation.payments.sandbox.app import create_sandbox
from reservation.payments.sandbox.config import SandboxConfig

__all__ = ["SandboxConfig", "create_sandbox"]
