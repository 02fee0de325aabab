"""The version, told to users and written into every file."""

__version__ = "0.1.0"
