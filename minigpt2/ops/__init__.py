"""The operations, each with a definition in plain tensor operations and a fast path that a test holds to it."""
