"""What runs a compiled program: its artifact, sessions, samplers, generation and quality."""
