"""The Redis adapter: key names, scripts, stores, the outbox and the embedded server."""
