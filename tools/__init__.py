"""Programs around the models: corpus, tokenizer, packing, evaluation, plots, the demo."""
