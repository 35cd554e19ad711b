#!/usr/bin/env python3
"""Health check of the images: exit code 0 if the server on $PORT (8000 if unset) says that it is well, else 1."""

import os
import sys
import urllib.error
import urllib.request

SECONDS = 5


def main() -> int:
    """Ask the server."""
    url = f"http://127.0.0.1:{os.environ.get('PORT', '8000')}/health"
    try:
        with urllib.request.urlopen(url, timeout=SECONDS) as answer:
            print(f"{url}: {answer.status}")
            return 0
    except (urllib.error.URLError, OSError) as error:
        print(f"{url}: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
