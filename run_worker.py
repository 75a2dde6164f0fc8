"""Do jobs: the same as `tidegate worker`. Settings come from the environment and `.env`."""

import sys

from tidegate.__main__ import main

if __name__ == "__main__":
    sys.argv[1:1] = ["worker"]
    main()
