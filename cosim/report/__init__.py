"""A result for people: on the terminal, and as one page with figures."""
