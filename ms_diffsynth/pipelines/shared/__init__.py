"""What several families use: sampling of images, text encoders, units of VAEs, positions, tokenizers."""
