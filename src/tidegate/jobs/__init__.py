"""Jobs: taken from PostgreSQL by workers, admitted and called like every other request."""
