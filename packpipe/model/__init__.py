"""NaViT: positions, attention within segments, pooling, the model, and its predictions."""
