"""Beyond one machine: a simulation in virtual time with measured costs."""
