"""HTTP: routes, authentication, request bodies and error responses."""
