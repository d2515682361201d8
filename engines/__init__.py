"""Building, running, timing and reporting on engines."""
