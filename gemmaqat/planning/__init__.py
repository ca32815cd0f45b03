"""What a configuration costs before it runs: parameters, memory, operations and time."""
