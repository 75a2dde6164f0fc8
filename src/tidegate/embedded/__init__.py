"""Bundled servers, for a laptop, a test or a first try: never for production."""
