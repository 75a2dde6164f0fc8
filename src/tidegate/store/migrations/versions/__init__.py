"""Steps of the schema, one file a revision, in order; later code accepts every later number."""
