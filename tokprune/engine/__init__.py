"""The surgery: hooks, gathering, masks, cache and the book-keeping of which tokens live."""
