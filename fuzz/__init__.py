"""Coverage-guided fuzzing of everything that reads bytes from outside: `make fuzz`. The tests do not need it."""
