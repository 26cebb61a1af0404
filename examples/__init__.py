"""Programs to read and to run: the demonstration (`make demo`) and netstack as a library."""
