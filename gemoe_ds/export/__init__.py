"""A trained run as a Hugging Face folder, for stock transformers and with its own model code."""
