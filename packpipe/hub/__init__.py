"""Pretrained encoders: weights that other libraries trained, in models of packed rows."""
