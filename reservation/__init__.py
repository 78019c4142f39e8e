"""Stock reservation for flash sales: what the service does, without any HTTP."""

__version__ = "0.1.0"
