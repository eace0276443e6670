"""The routed experts of one layer, and the ways to compute them."""
