"""The commands of the command line, a module for each group; each imports the rooms that it needs when it runs."""
