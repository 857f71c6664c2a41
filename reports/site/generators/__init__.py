"""What the site's pages are filled with: read from the code, printed by the commands, drawn from LaTeX."""
