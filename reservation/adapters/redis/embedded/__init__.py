"""The Valkey server that the service starts for itself."""
