"""The vocabulary and the rules, with no I/O in them."""
