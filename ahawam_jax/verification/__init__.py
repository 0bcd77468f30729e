"""Fixtures of the released code, and the checks that recompute them. Imports training and all below; only commands
import it."""
