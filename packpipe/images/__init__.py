"""A file to patches: opened, decoded at the planned size, written into its row.

Obeys the plan and decides nothing; `pool` does it in processes of its own.
"""
