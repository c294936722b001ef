"""Files, messages, processes and devices: what every part of the system uses."""
