"""Turns image files into patches: opens, decodes at the planned size, writes into the row.

Follows the plan and decides nothing. `pool` does this in other processes.
"""
