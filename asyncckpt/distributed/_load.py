"""Load checkpoints of many ranks as DCP does, every checksum compared."""
