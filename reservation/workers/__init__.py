"""The roles behind the API: reaper, settler, flusher; each does one round at a time."""
