"""The command line: each command parses options, calls the package and prints the result."""
