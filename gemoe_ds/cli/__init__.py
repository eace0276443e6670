"""The command `gemoe`: one file a command, and nothing in it but its options and what it calls."""
