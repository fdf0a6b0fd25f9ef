"""Files, JSON, arguments, devices, plug-ins and processes."""
