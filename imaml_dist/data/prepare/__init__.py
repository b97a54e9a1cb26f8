"""Raw images -> class records; one source per file."""
