"""The edge: HTTP and the command line. Each part parses, calls and translates, a few lines each."""
