"""Sales: definition, catalog and explanation."""
