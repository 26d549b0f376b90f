"""NaViT and its answers: positions, attention within segments, pooling, predictions."""
