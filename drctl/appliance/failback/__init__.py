"""The way back of a group to the site that it came from."""
