"""States of many ranks: from live objects to the plans and the metadata of DCP, and back."""
