"""Augmentation of packed rows: flips, turns, boxes, colours, mixtures, drawn anew every epoch."""
