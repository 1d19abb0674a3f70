"""What differs between kinds of base models, and how a base is found and loaded."""
