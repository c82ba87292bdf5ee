"""How many bytes this process can still take: of a device, of the host within its limits, of one allocation."""
