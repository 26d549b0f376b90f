"""Reads source datasets: which columns to use, image sizes, labels, images, token lists."""
