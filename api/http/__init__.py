"""HTTP: routes, bodies, errors, authentication and the protocol beneath them."""
