"""`python -m gemmaqat VERB ...` is `gemmaqat VERB ...`."""

from gemmaqat.main import run

if __name__ == "__main__":
    run()
