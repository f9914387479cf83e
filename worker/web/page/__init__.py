"""The page at `/`: what this worker does, live. It sends no query when it is opened or updated."""
