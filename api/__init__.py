"""Entry points: HTTP and the command line. Each parses, calls the application and translates."""
