"""Augmentation of packed rows: flips, turns, erased boxes and colours, drawn anew every epoch."""
