"""Score a model on held-out conversations and leave behind what the analysis reads."""
