"""The command line: each command is a view of a function of the package."""
