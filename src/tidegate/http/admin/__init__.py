"""Routes of operators, under `/admin`."""
