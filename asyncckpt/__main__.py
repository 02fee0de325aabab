"""Run asyncckpt's commands as `python -m asyncckpt`."""

from __future__ import annotations

from asyncckpt.cli import main

if __name__ == "__main__":
    main()
