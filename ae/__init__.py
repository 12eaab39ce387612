"""Text -> tokens -> chunks of K tokens -> one latent vector -> tokens."""
