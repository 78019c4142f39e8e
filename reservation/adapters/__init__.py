"""One package per outside system. None imports another."""
