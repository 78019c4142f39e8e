"""Sales: catalog, listing and administration."""
