"""Write the demo's training rows and held-out questions, as they ship with Parley.

    python tools/build_demo_data.py --output src/parley/assets/demo-data

The same seed gives the same files; tests/tools/test_demo_data.py holds the shipped ones to the generator.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from demo_data import write_assets

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("src/parley/assets/demo-data"))
    write_assets(parser.parse_args().output)
