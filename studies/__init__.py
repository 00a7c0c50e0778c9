"""What measures this project's own studies and writes its result pages."""
