"""Code in C for the CPU, without torch's ABI: what Python and torch operators cannot do as fast."""
