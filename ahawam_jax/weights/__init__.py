"""Foreign files of weights and their names in our parameter tree. Imports models alone."""
