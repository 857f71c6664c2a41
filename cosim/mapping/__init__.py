"""Which kernel runs each op, for how long, and what a rank's streams, links and memory see of it."""
