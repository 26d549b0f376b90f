"""The packed row: in memory, in Arrow, and how it is filled from images or tokens."""
