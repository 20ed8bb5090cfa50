"""From a recipe to a directory with everything it asks for."""
