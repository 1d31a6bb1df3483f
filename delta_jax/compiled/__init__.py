"""What a compiled program costs, read from what its compiler writes: instructions, memory traffic, cycles."""
