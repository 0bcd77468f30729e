"""The entry points, a file per command, and the flags they share. On the top floor: imports everything below, and
only `ahawam_jax.__main__` and the entry points of `export` import from here."""
