"""Measuring what users wait for and pay for. `instavm bench` and the scripts in `bench/` share this."""
