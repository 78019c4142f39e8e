"""The fast path of prepare, without the framework."""
