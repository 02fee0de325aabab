"""From a file to a state, and into live objects; the catalog of a directory."""
