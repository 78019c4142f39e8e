"""Everything that knows Redis: key names, scripts, the store, the outbox, the embedded server."""
