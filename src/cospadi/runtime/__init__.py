"""What a run needs to know of the machine: devices, memory, fingerprints."""
