"""Hardware, and nothing about training: given work, answers time, traffic and energy."""
