"""What a dataset gives: its columns, sizes, labels, images and token lists."""
