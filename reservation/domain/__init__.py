"""Domain vocabulary and rules, without I/O."""
