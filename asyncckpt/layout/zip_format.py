"""Names of records and structures of zip files, for the writer and the reader of the format of torch.load."""

from __future__ import annotations

import struct

ROOT = "archive/"
STORAGES = ROOT + "data/"
DATA_PICKLE = ROOT + "data.pkl"
DESCRIBES = ".asyncckpt.json"  # in the root folder, which has another name in files of torch.save
DESCRIPTION = ROOT + DESCRIBES
ALIGNMENT = 64
# A size or an offset from here on needs a zip64 field.
ZIP64 = 0xFFFF_FFFF
ZIP64_COUNT = 0xFFFF

LOCAL = struct.Struct("<4sHHHHHIIIHH")
CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
END = struct.Struct("<4sHHHHIIH")
END64 = struct.Struct("<4sQHHIIQQQQ")
END64_LOCATOR = struct.Struct("<4sIQI")
LOCAL_MAGIC, CENTRAL_MAGIC, DESCRIPTOR_MAGIC = b"PK\x03\x04", b"PK\x01\x02", b"PK\x07\x08"
END_MAGIC, END64_MAGIC, END64_LOCATOR_MAGIC = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
EXTRA = struct.Struct("<HH")  # id and length of a field in a header's extra part
