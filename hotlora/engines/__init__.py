"""Whether an engine really applies an exported adapter: the engines' runner files, and `verify`."""
