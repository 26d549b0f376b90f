"""Writes packed rows to folders that survive a kill: `pack`, `pack_pairs`; `Packer`, summaries."""
