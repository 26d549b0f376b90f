"""Turns packs into the batches of this rank; resumed anywhere, they are the same bytes."""
