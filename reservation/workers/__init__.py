"""Background workers: reaper, settler, refunder and flusher; each runs one round at a time."""
