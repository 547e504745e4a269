import sys

from cnntrain.cli import main

sys.exit(main())
