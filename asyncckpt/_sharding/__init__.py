"""States of many ranks: from live objects to the plans and the metadata of DCP, and back.

`torch.distributed.checkpoint` takes a second to import: it is imported in the functions that need it.
"""
