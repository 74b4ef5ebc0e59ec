"""`python -m hf_geta` is `hf-geta`."""

import sys

from hf_geta.cli import main

if __name__ == "__main__":
    sys.exit(main())
