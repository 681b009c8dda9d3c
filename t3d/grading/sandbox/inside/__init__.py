"""The code that runs inside a box, under a bare interpreter: it imports only the standard library."""
