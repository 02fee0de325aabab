"""Inspection: what files hold and in what they differ, read in small pieces and never unpickled."""
