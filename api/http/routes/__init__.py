"""The endpoints, one controller per resource."""
