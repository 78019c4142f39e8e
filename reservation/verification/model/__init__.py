"""The contract once more, in plain Python and without any I/O: the oracle that judges the rest."""
