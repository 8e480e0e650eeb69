"""Plans and their runs on the command line: prepared, carried out, recorded, reported."""
