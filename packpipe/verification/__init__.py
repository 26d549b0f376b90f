"""Is a folder what `pack` wrote: checksums, rows, every example once."""
