"""python -m asrkf_gguf.cli"""

import sys

from .. import cli

sys.exit(cli.main())
