"""Many runs from one file: `etherdiff sweep`."""
