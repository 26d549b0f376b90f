"""Checks that a folder is what `pack` wrote: checksums, rows, every example once."""
