"""Where files lie that many machines write or read: a folder, or an object store."""
