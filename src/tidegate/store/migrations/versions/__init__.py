"""One file a revision, numbered in order; later code accepts every later number."""
