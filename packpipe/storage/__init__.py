"""Where files are written that many machines make together: a folder, or an object store."""
