"""Everything that the documentation claims, measured again on one state of the source."""
