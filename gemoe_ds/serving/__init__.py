"""An exported folder in the servers that are installed: asked, timed and compared."""
