"""Packs to batches: for this rank, in an order that resumes to the byte."""
