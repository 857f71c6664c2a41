"""What is trained: plain PyTorch Transformers, named configurations with sources, loaders for other people's models."""
