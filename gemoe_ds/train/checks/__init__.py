"""What is checked, and told, before a run trains."""
