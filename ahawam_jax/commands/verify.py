"""ahawam verify DIR: recompute the fixtures in DIR with this package on this machine.

Reads DIR/config.json, builds the model at those sizes and compares every stored tensor. The error of a tensor is
its largest absolute deviation over its largest stored entry. Exits with 1 if an error is above its tolerance,
if anything is NaN, if a file is missing, or if a stored tensor was neither used nor compared.
"""

import argparse
import sys

from data_pipelines.paths import local_path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="ahawam verify", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("folder", type=local_path, help="folder with config.json and the fixtures' safetensors files")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="check these fixtures only")
    options = parser.parse_args(argv)
    from ahawam_jax.verification.verify import verify  # it starts a JAX backend

    try:
        return 1 if verify(options.folder, options.only) else 0
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
