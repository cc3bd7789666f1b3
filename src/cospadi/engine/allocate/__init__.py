"""The plan after calibration: bytes and representations by measured sensitivity."""
