"""What grows with the number of ranks: measured here, and projected to clusters (`make scale`)."""
