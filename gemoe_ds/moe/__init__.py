"""One mixture-of-experts layer in pure torch: route, dispatch, experts, combine."""
