"""A whole deployment under steady load for a long time, with a fault every so often."""
