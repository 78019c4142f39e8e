"""Reference model: the contract in plain Python without any I/O, the oracle for all other code."""
