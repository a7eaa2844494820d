"""What a model costs to run: size, memory and time, of several models side by side."""
