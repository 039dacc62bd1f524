"""Tables and figures from rows of results."""
