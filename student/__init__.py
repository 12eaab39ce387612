"""Latents -> the next latent -> the K tokens it stands for."""
