"""Writes the pages that are made from the code, docs/command-line.md and docs/settings.md: `make reference`."""

import argparse
import sys
from pathlib import Path

from reference import command_line, settings

from xquant_vllm.cli.main import parser

ROOT = Path(__file__).resolve().parent.parent


def pages() -> dict[Path, str]:
    """The pages as they have to be, by their files."""
    docs = ROOT / "docs"
    return {docs / "command-line.md": command_line.page(parser()), docs / "settings.md": settings.page()}


def main() -> int:
    """Write them, or say which are out of date."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    options.add_argument("--check", action="store_true", help="write nothing; fail if a page is not up to date")
    check = options.parse_args().check
    old = [path for path, text in pages().items() if not path.is_file() or path.read_text() != text]
    for path in old:
        if not check:
            path.write_text(pages()[path])
        print(f"{path.relative_to(ROOT)}: {'not up to date: run make reference' if check else 'written'}")
    return int(check and bool(old))


if __name__ == "__main__":
    sys.exit(main())
