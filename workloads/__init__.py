"""What is trained: plain PyTorch Transformers, named configurations with their sources, and loaders for other people's models."""
