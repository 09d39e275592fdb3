"""What a plan looks like: as text, as a page, as a file, beside another."""
