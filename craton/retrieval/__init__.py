"""Documents to passages, an index of them, and answers that cite them."""
