"""Rows to a folder: `pack`, `Packer`, pairs, shards that survive a kill, summaries."""
