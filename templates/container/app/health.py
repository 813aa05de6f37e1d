"""Exit status 0 where the server is ready, asked the way that its callers ask it: through Envoy."""

import os
import sys
import urllib.request

URL = "http://127.0.0.1:8080" + os.environ["HEALTH"]


def main():
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(URL, timeout=4) as answer:
            print(f"{URL}: {answer.status}")
            return 0
    except OSError as error:
        print(f"{URL}: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
